"""The backend's own engine in this process, without ranks: what the parallel result is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from ..checkpoint_files.content import content_key
from ..config import MeshSpec, SamplerSpec
from ..distributed.control import Control
from ..rpc.conditioning import Conditioning
from ..rpc.extras import AnyExtra
from ..rpc.headers import RequestHeader
from ..rpc.messages import (
    ControlUse,
    LoadControl,
    Loaded,
    LoadModel,
    Prompt,
    Request,
    Sample,
)
from ..rpc.wire import tensor_meta
from .engine import Engine
from .jobs import Job


class OneProcess:
    """A model that this process samples alone. `weights` as LoadModel has them; `loaded` tells what a backend would."""

    def __init__(self, path: Path, dtype: str = "float32", weights: str = "") -> None:
        self._engine = Engine(torch.device("cpu"))
        self.loaded = self._load(LoadModel(str(path), content_key(path), dtype, MeshSpec(), weights=weights))

    def load_control(self, path: Path) -> str:
        """The name of the ControlNet at `path`, from now on held for this model."""
        return self._load(LoadControl(str(path), content_key(path), self.loaded.model)).model

    def sample(
        self,
        latent: Tensor,
        positive: Conditioning,
        negative: Conditioning,
        spec: SamplerSpec,
        hints: Mapping[str, Tensor] | None = None,
        extras: Sequence[AnyExtra] = (),
    ) -> Tensor:
        """As `RemoteModel.sample`, of the same settings; `hints` of ControlNets by name, which are on both prompts."""
        tensors = [latent]

        def attach(tensor: Tensor) -> int:
            tensors.append(tensor)
            return len(tensors) - 1

        controls = [ControlUse(name, attach(hint)) for name, hint in (hints or {}).items()]

        def prompt(conditioning: Conditioning) -> Prompt:
            return msgspec.structs.replace(conditioning.prompt(attach), controls=controls)

        named = [extra.each(attach, attach) for extra in extras]
        body = Sample(self.loaded.model, spec, 0, prompt(positive), prompt(negative), extras=named)
        _, (sampled,) = self._ask(body, tensors)
        return sampled

    def _load(self, body: Request) -> Loaded:
        loaded, _ = self._ask(body, [])
        assert isinstance(loaded, Loaded)
        return loaded

    def _ask(self, body: Request, tensors: list[Tensor]) -> tuple[object, list[Tensor]]:
        header = RequestHeader(1, body, [tensor_meta(tensor) for tensor in tensors])
        job = Job(Control(), lambda body, tensors: None, lambda: False)
        return self._engine.handle(header, tensors, job)
