"""What a backend holds, as its client sees it: a model to sample with, a VAE to decode with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..config import ModelSampling, SamplerSpec
from ..errors import BackendLostError, StartError, UnknownModelError, UnknownPatchesError
from ..rpc.conditioning import Conditioning
from ..rpc.messages import (
    Decode,
    Encode,
    Forward,
    Loaded,
    LoadModel,
    LoadVAE,
    PatchFilePart,
    Preview,
    Progress,
    Prompt,
    Request,
    Result,
    Sample,
    StepDone,
    Unload,
)
from .connection import Connection, OnEvent
from .sent_tensors import Attachment
from .weight_patches import WeightPatches, parts_of

RELOADS = 10


@dataclass(frozen=True)
class Step:
    """What `on_step` is told: step `index` of `total` is done. x and denoised, where a preview was asked for."""

    index: int
    total: int
    x: Tensor | None = None
    denoised: Tensor | None = None


@dataclass
class _Remote:
    """Something loaded in a backend; it is loaded again by itself when the backend has lost it.

    `last` is what rank 0 says of the last job: its own seconds, and the steps.
    """

    backend: Connection
    load: LoadModel | LoadVAE
    loaded: Loaded
    last: Result | None = field(init=False, default=None)
    _generation: str = field(init=False)

    def __post_init__(self) -> None:
        self._generation = self.backend.generation

    @property
    def name(self) -> str:
        """The name under which the backend holds it."""
        return self.loaded.model

    @property
    def file(self) -> str:
        """The name of the file that it was loaded from."""
        return PurePath(self.load.paths[0] if isinstance(self.load, LoadVAE) else self.load.path).name

    def ensure_loaded(self, should_cancel: Callable[[], bool] | None = None, on_event: OnEvent | None = None) -> Loaded:
        """Resident now; reads nothing where it was."""
        self.loaded = self.backend.load(self.load, on_event, should_cancel)
        self._generation = self.backend.generation
        return self.loaded

    def leave(self, should_cancel: Callable[[], bool] | None = None) -> None:
        """The backend lets it go on all ranks, after the jobs that wait; the next request brings it back.

        Asked for by a callback of a request that is under way, it stays.
        """
        with self.backend.lock, suppress(BackendLostError, StartError):  # a backend that has ended holds nothing
            if not self.backend.asking:
                self.backend.request(Unload([self.name]), should_cancel=should_cancel)

    def is_held(self, should_cancel: Callable[[], bool] | None = None) -> bool:
        """Whether the backend holds it now; one that has ended holds nothing, and is not started.

        Asked by a callback of a request that is under way, it is taken to be.
        """
        with self.backend.lock, suppress(BackendLostError, StartError):
            if self.backend.asking:
                return True
            return self.name in [model.model for model in self.backend.status(should_cancel).models]
        return False

    def _request(self, body: Request, attachments: Sequence[Attachment], **callbacks: Any) -> list[Tensor]:
        """Its tensors, once what it needs is loaded: where another client has freed that, it is loaded again."""
        should_cancel = callbacks.get("should_cancel")
        with self.backend.lock:
            self.backend.follow_restarts(should_cancel)
            if self._generation != self.backend.generation:
                self.ensure_loaded(should_cancel)
            for tries_left in reversed(range(RELOADS)):
                try:
                    reply, tensors = self.backend.request(body, attachments, **callbacks)
                    break
                except UnknownModelError:  # another client has freed it, and may do so again before this one's turn
                    if not tries_left:
                        raise
                    self.ensure_loaded(should_cancel)
            assert isinstance(reply, Result)
            self.last = reply
            return tensors


class RemoteModel(_Remote):
    """A diffusion model in a backend."""

    timeline: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModel:
        """Itself: copies of a MODEL share it."""
        return self

    def _patched_request(
        self,
        body: Sample | Forward,
        attachments: Sequence[Attachment],
        patches: WeightPatches | None,
        **callbacks: Any,
    ) -> list[Tensor]:
        """As `_request`, with these patches on the model's weights; ranks that don't find them are sent them."""
        if not patches:
            return self._request(body, attachments, **callbacks)
        named = msgspec.structs.replace(body, patches=patches.named())
        try:
            return self._request(named, attachments, **callbacks)
        except UnknownPatchesError:  # its files were removed, or the ranks are on another machine
            elsewhere = patches.is_written
            named = msgspec.structs.replace(body, patches=patches.named())
            for name in named.patches.files if elsewhere else ():
                self._bring(name, callbacks.get("should_cancel"))
            return self._request(named, attachments, **callbacks)

    def _bring(self, name: str, should_cancel: Callable[[], bool] | None) -> None:
        for part, (data, last) in enumerate(parts_of(name)):
            body = PatchFilePart(name, part, last, 0)
            data_tensor = torch.frombuffer(data, dtype=torch.uint8)
            self.backend.request(body, [Attachment(data_tensor)], should_cancel=should_cancel)

    @property
    def family(self) -> str:
        return self.loaded.family

    def sample(
        self,
        latent: Tensor,
        positive: Conditioning,
        negative: Conditioning | None = None,
        *,
        seed: int = 0,
        steps: int = 20,
        cfg_scale: float = 4.5,
        sampler: str = "euler",
        scheduler: str = "simple",
        denoise: float = 1.0,
        shift: float = 3.0,
        warmup_steps: int | None = None,
        num_patches: int = 0,
        noise: Tensor | None = None,
        sigmas: Tensor | None = None,
        noise_mask: Tensor | None = None,
        batch_index: Sequence[int] | None = None,
        preview: Preview = "none",
        trace: bool = False,
        patches: WeightPatches | None = None,
        model_sampling: ModelSampling | None = None,
        rescale_cfg: float = 0.0,
        differential: float | None = None,
        on_step: Callable[[Step], None] | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Tensor:
        """The sampled latent: KSampler's, for the same seed and settings.

        Args:
            latent: (B, C, Y, X), unscaled as a VAE gives it; all zeros to start from noise alone. C is 16 for SD3, 4
                for SDXL.
            negative: None, or cfg_scale 1, computes no uncond branch.
            shift: of flow models.
            warmup_steps: steps after so many compute with what the others had a step ago, which is faster and not exact:
                a UNet's other bands, the other ranks of a ring, the other patches in a pipeline. None: all are exact.
            num_patches: that flow through the pipeline of pp ranks; 0 is as many as stages.
            noise, sigmas: in place of those that seed and scheduler give.
            batch_index: which draws of the seed's the rows get. One latent becomes as many as are named; one draw goes to
                all rows.
            noise_mask: 1 where the latent may change, (B, 1, Y, X) of any Y and X.
            preview: of which steps `on_step` gets the latents.
            model_sampling: what the model's output means, and its sigmas, in place of what its file and `shift` say.
            rescale_cfg: how far guidance is brought back to the spread of cond, 0 to 1: RescaleCFG's multiplier.
            differential: makes the mask's values say when they begin to change: DifferentialDiffusion's strength.
            trace: keep what each rank did when, in `timeline`: rank, and the columns of distributed/traffic.py.
            patches: on the model's weights, for this job.
            on_step: told after each step. What it raises cancels the job and is raised again.
        Returns: (B, C, Y, X), fp32, on the CPU.
        Raises: InputError, ConfigError, CancelledError, BackendLostError, RankError.
        """
        spec = SamplerSpec(
            sampler,
            scheduler,
            steps,
            cfg_scale,
            denoise,
            seed,
            shift,
            warmup_steps,
            num_patches,
            model_sampling,
            rescale_cfg,
            differential,
        )
        halves = (torch.float16, torch.bfloat16)  # KSampler rounds its noise to them
        attachments = [Attachment(latent if latent.dtype in halves else latent.float())]

        def attach(tensor: Tensor, kept: bool = False) -> int:
            attachments.append(Attachment(tensor, kept))
            return len(attachments) - 1

        def prompt(conditioning: Conditioning) -> Prompt:
            return conditioning.prompt(attach(conditioning.context, kept=True), attach(conditioning.pooled, kept=True))

        body = Sample(
            self.name,
            spec,
            0,
            prompt(positive),
            None if negative is None else prompt(negative),
            mask=None if noise_mask is None else attach(noise_mask.float()),
            noise=None if noise is None else attach(noise.float()),
            sigmas=None if sigmas is None else attach(sigmas.float()),
            batch_index=None if batch_index is None else list(batch_index),
            preview=preview,
            trace=trace,
        )

        def on_event(event: Progress | StepDone, tensors: Sequence[Tensor]) -> None:
            if on_step is not None and isinstance(event, StepDone):
                x, denoised = tensors if tensors else (None, None)
                on_step(Step(event.index, event.total, x, denoised))

        tensors = self._patched_request(body, attachments, patches, on_event=on_event, should_cancel=should_cancel)
        self.timeline = tensors[1].clone() if trace else None
        return tensors[0].clone()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        patches: WeightPatches | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Tensor:
        """One exact evaluation: the output, fp32, at the model's own input; rows spread over cfg and dp.

        Args:
            x: (B, C, Y, X). timesteps: (B,), 1000 * sigma for flow models. context: (B, L, E). pooled: (B, A).
        """
        attachments = [
            Attachment(x),
            Attachment(timesteps.float()),
            Attachment(context, True),
            Attachment(pooled, True),
        ]
        body = Forward(self.name, 0, 1, 2, 3)
        tensors = self._patched_request(body, attachments, patches, should_cancel=should_cancel)
        return tensors[0].clone()


class RemoteVAE(_Remote):
    """A VAE in a backend."""

    @property
    def latent_channels(self) -> int:
        return self.loaded.channels

    def decode(self, latent: Tensor, *, raw: bool = False, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, Y, X, 3) in 0..1, fp32; with `raw` the model's own (B, 3, Y, X), about -1..1.

        Args:
            latent: (B, C, Y, X), unscaled.
        """
        tensors = self._request(Decode(self.name, 0, raw), [Attachment(latent.float())], should_cancel=should_cancel)
        return tensors[0].clone()

    def encode(self, image: Tensor, *, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, C, Y / 8, X / 8), unscaled, fp32, of an image (B, Y, X, 3) in 0..1."""
        tensors = self._request(Encode(self.name, 0), [Attachment(image.float())], should_cancel=should_cancel)
        return tensors[0].clone()
