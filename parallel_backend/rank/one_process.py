"""The backend's own engine in this process, without ranks: what the parallel result is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint_files.content import content_key
from ..config import MeshSpec, SamplerSpec
from ..distributed.control import Control
from ..rpc.conditioning import Conditioning
from ..rpc.messages import Loaded, LoadModel, Request, RequestHeader, Sample
from ..rpc.wire import tensor_meta
from .engine import Engine
from .jobs import Job


class OneProcess:
    """A model that this process samples alone. `weights` as LoadModel has them; `loaded` tells what a backend would."""

    def __init__(self, path: Path, dtype: str = "float32", weights: str = "") -> None:
        self._engine = Engine(torch.device("cpu"))
        loaded, _ = self._ask(LoadModel(str(path), content_key(path), dtype, MeshSpec(), weights=weights), [])
        assert isinstance(loaded, Loaded)
        self.loaded = loaded

    def sample(self, latent: Tensor, positive: Conditioning, negative: Conditioning, spec: SamplerSpec) -> Tensor:
        """As `RemoteModel.sample`, of the same settings."""
        tensors = [latent]

        def attach(tensor: Tensor) -> int:
            tensors.append(tensor)
            return len(tensors) - 1

        body = Sample(self.loaded.model, spec, 0, positive.prompt(attach), negative.prompt(attach))
        _, (sampled,) = self._ask(body, tensors)
        return sampled

    def _ask(self, body: Request, tensors: list[Tensor]) -> tuple[object, list[Tensor]]:
        header = RequestHeader(1, body, [tensor_meta(tensor) for tensor in tensors])
        job = Job(Control(), lambda body, tensors: None, lambda: False)
        return self._engine.handle(header, tensors, job)
