"""What a backend holds, as its client sees it: a model to sample with, a VAE to decode with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..config import CELL, ModelSampling, SamplerSpec
from ..errors import BackendLostError, NotFiniteError, StartError, UnknownModelError, UnknownPatchesError
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
from .dtypes import vae_dtype
from .not_finite import NotFinite, held_by, is_finite
from .sent_tensors import Attachment
from .weight_patches import WeightPatches, parts_of

log = logging.getLogger("parallel_backend")
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

    `last` is what rank 0 says of the last job: its own seconds, and the steps. `note` is what the user should know of it:
    NaN or infinity in its result, which with `nan_is_error` is an error. Empty where there is nothing to tell.
    """

    backend: Connection
    load: LoadModel | LoadVAE
    loaded: Loaded
    last: Result | None = field(init=False, default=None)
    note: str = field(init=False, default="")
    nan_is_error: bool = field(init=False, default=False)
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

    def _tell(self, found: NotFinite) -> None:
        """Raises: NotFiniteError: it is to be an error."""
        if self.nan_is_error:
            raise NotFiniteError(found.message, found.remedy)
        self.note = f"{found.message} {found.remedy}"
        log.warning("%s", self.note)


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
        Returns: (B, C, Y, X), fp32, on the CPU. What NaN or infinity in an input, or made by the model, comes to; `note`
            then tells at which step it began.
        Raises: InputError, ConfigError, CancelledError, BackendLostError, RankError; NotFiniteError, with `nan_is_error`.
        """
        inputs = {"latent": latent, "noise": noise, "noise mask": noise_mask} | _tensors_of(positive, negative)
        self._begin(inputs)
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
            return conditioning.prompt(partial(attach, kept=True))

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
        if not is_finite(tensors[0]):
            assert self.last is not None
            step = (0, 0) if self.last.bad_step is None else (self.last.bad_step + 1, self.last.steps)
            self._tell(NotFinite(held_by(inputs), *step))
        return tensors[0].clone()

    def _begin(self, inputs: Mapping[str, Tensor | None]) -> None:
        """Nothing is told yet. Raises: NotFiniteError: an input holds what is to be an error, before anything is computed."""
        self.note = ""
        if self.nan_is_error and (given := held_by(inputs)):
            self._tell(NotFinite(given, in_result=False))

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        patches: WeightPatches | None = None,
        step: Callable[[], tuple[int, int]] = lambda: (0, 0),
        should_cancel: Callable[[], bool] | None = None,
    ) -> Tensor:
        """One exact evaluation: the output, fp32, at the model's own input; rows spread over cfg and dp.

        Args:
            x: (B, C, Y, X), extra channels included. timesteps: (B,), 1000 * sigma for flow models. context: (B, L, E). pooled: (B, A).
            step: asked where the output holds NaN or infinity: of which step, from 1, of how many it is; (0, 0) of none.
        Raises: as `sample`.
        """
        self.note = ""
        attachments = [
            Attachment(x),
            Attachment(timesteps.float()),
            Attachment(context, True),
            Attachment(pooled, True),
        ]
        body = Forward(self.name, 0, 1, 2, 3)
        tensors = self._patched_request(body, attachments, patches, should_cancel=should_cancel)
        if not is_finite(tensors[0]):
            prompt = {"conditioning": context, "pooled conditioning": pooled}
            number, steps = step()
            # In a sampling, x has been made: at the first step of what came in, later on the way.
            made = ({"latent": x}, {"latent (or its noise or mask)": x}, {})[min(number, 2)]
            self._tell(NotFinite(held_by(made | prompt), number, steps))
        return tensors[0].clone()


class RemoteVAE(_Remote):
    """A VAE in a backend."""

    @property
    def latent_channels(self) -> int:
        return self.loaded.channels

    def decode(self, latent: Tensor, *, raw: bool = False, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, Y, X, 3) in 0..1, fp32; with `raw` the model's own (B, 3, Y, X), about -1..1.

        A float16 that gives NaN or infinity of a latent without is left for good, for what suits the ranks' cards: `note`
        then tells so.

        Args:
            latent: (B, C, Y, X), unscaled.
        Raises: InputError, CancelledError, BackendLostError, RankError; OutOfMemoryError: the ranks are ready for the next
            request, of a part of the latent perhaps; NotFiniteError, with `nan_is_error`.
        """
        return self._computed(lambda name: Decode(name, 0, raw), "latent", latent, should_cancel)

    def encode(self, image: Tensor, *, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, C, Y / 8, X / 8), unscaled, fp32, of an image (B, Y, X, 3) in 0..1; the rest as for `decode`.

        What sides have beyond a multiple of 8 is cut off, as much at either end.
        """
        return self._computed(lambda name: Encode(name, 0), "image", cropped(image), should_cancel)

    def _computed(
        self,
        body: Callable[[str], Decode | Encode],
        what: str,
        x: Tensor,
        should_cancel: Callable[[], bool] | None,
    ) -> Tensor:
        self.note, x = "", x.float()
        given = held_by({what: x})
        if given and self.nan_is_error:
            self._tell(NotFinite(given, in_result=False))
        out = self._request(body(self.name), [Attachment(x)], should_cancel=should_cancel)[0]
        left = "" if given or self.load.dtype != "float16" or is_finite(out) else self._leave_float16(should_cancel)
        if left:
            out = self._request(body(self.name), [Attachment(x)], should_cancel=should_cancel)[0]
        if given or not is_finite(out):
            self._tell(NotFinite(given, in_result=not is_finite(out)))
        elif left:
            self.note = left
            log.warning("%s", left)
        return out.clone()

    def _leave_float16(self, should_cancel: Callable[[], bool] | None) -> str:
        """It is loaded in what suits the ranks' cards. Returns: what is to be told of that."""
        dtype = vae_dtype(self.backend.status(should_cancel).ranks)
        self.leave(should_cancel)
        self.load = msgspec.structs.replace(self.load, dtype=dtype)
        self.ensure_loaded(should_cancel)
        return f"{self.file} overflows in float16: it gave NaN, and is computed in {dtype} from now on."


def cropped(image_BYXC: Tensor) -> Tensor:
    """The middle of the image whose sides are multiples of a cell's; a side of less than a cell stays as it is."""
    for dim in (1, 2) if image_BYXC.ndim == 4 else ():
        side = image_BYXC.shape[dim]
        if side >= CELL:
            image_BYXC = image_BYXC.narrow(dim, side % CELL // 2, side - side % CELL)
    return image_BYXC


def _tensors_of(positive: Conditioning, negative: Conditioning | None) -> dict[str, Tensor]:
    named = {"positive": positive} | ({} if negative is None else {"negative": negative})
    found = {f"{name} conditioning": prompt.context for name, prompt in named.items()}
    found |= {f"{name} concat": prompt.concat for name, prompt in named.items() if prompt.concat is not None}
    return found | {f"{name} pooled conditioning": prompt.pooled for name, prompt in named.items()}
