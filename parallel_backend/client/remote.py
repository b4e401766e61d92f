"""A diffusion model in a backend, as its client sees it: to sample with, or to ask for one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..config import ModelSampling, SamplerSpec, StepCache
from ..config.guidance import APG
from ..errors import UnknownModelError, UnknownPatchesError
from ..rpc.conditioning import Conditioning
from ..rpc.extras import AnyExtra, LaterEvaluation
from ..rpc.messages import (
    Forward,
    LoadControl,
    LoadModel,
    PatchFilePart,
    Preview,
    Progress,
    Sample,
    StepDone,
)
from .connection import OnEvent
from .generation import generate
from .guidance import PerpNeg, WeakerModel
from .held import Held
from .not_finite import NotFinite, held_by, is_finite
from .pipeline_parts import PipelineParts
from .remote_control import ControlUse, RemoteControl
from .request_tensors import RequestTensors, Residuals
from .sent_tensors import Attachment
from .weight_patches import WeightPatches, parts_of


@dataclass(frozen=True)
class Step:
    """What `on_step` is told: step `index` of `total` is done. x and denoised, where a preview was asked for."""

    index: int
    total: int
    x: Tensor | None = None
    denoised: Tensor | None = None


class RemoteModel(Held[LoadModel]):
    """A diffusion model in a backend."""

    timeline: Tensor | None = None
    # Set where it is loaded with what a prompt needs.
    parts: PipelineParts | None = None
    generate = generate

    def __post_init__(self) -> None:
        super().__post_init__()
        self._controls: dict[LoadControl, RemoteControl] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteModel:
        """Itself: copies of a MODEL share it."""
        return self

    def load_control(self, path: str, key: str, on_event: OnEvent | None = None, **settings: Any) -> RemoteControl:
        """The ControlNet at `path`, as the backend finds it, for this model: see `Backend.load_control`.

        For one that it holds no job is asked for, which would wait for those of other clients.
        """
        should_cancel = settings.get("should_cancel")
        load = LoadControl(path, key, self.name, self.load.kernel)
        if load in self._controls and self._controls[load].is_held(should_cancel):
            return self._controls[load]
        try:
            loaded = self.backend.load(load, on_event, should_cancel)
        except UnknownModelError:  # another client has freed the model
            self.ensure_loaded(should_cancel)
            loaded = self.backend.load(load, on_event, should_cancel)
        self._controls[load] = RemoteControl(self.backend, load, loaded)
        return self._controls[load]

    def _patched_request(
        self,
        body: Sample | Forward,
        attachments: Sequence[Attachment],
        patches: WeightPatches | None,
        controls: Sequence[ControlUse],
        **callbacks: Any,
    ) -> list[Tensor]:
        """As `_request`, with these patches on the model's weights; ranks that don't find them are sent them."""
        others = [*{use.net.name: use.net for use in controls}.values()]
        if not patches:
            return self._request(body, attachments, others, **callbacks)
        named = msgspec.structs.replace(body, patches=patches.named())
        try:
            return self._request(named, attachments, others, **callbacks)
        except UnknownPatchesError:  # its files were removed, or the ranks are on another machine
            elsewhere = patches.is_written
            named = msgspec.structs.replace(body, patches=patches.named())
            for name in named.patches.files if elsewhere else ():
                self._bring(name, callbacks.get("should_cancel"))
            return self._request(named, attachments, others, **callbacks)

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
        apg: APG | None = None,
        perp_neg: PerpNeg | None = None,
        weaker: WeakerModel | None = None,
        differential: float | None = None,
        step_cache: StepCache | None = None,
        controls: Sequence[ControlUse] = (),
        negative_controls: Sequence[ControlUse] | None = None,
        extras: Sequence[AnyExtra] = (),
        uncond_extras: Sequence[AnyExtra] = (),
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
            apg: adaptive projected guidance, where there is guidance: APG's settings.
            perp_neg: guidance of three prompts, as of the guider PerpNegGuider; needs `negative`.
            weaker: guidance away from a weaker model, at any cfg_scale: skip-layer and perturbed-attention guidance.
            differential: makes the mask's values say when they begin to change: DifferentialDiffusion's strength.
            step_cache: which evaluations take most of their work from an earlier one, which is faster and not exact; `note` tells how
                many did. None: all are computed whole.
            controls: ControlNets in the ranks, on the positive prompt; and on the negative one, without `negative_controls`.
            extras: what hangs inside the model: see rpc/extras. `uncond_extras`: beside them, while it evaluates the negative
                prompt.
            trace: keep what each rank did when, in `timeline`: rank, and the columns of distributed/traffic.py.
            patches: on the model's weights, for this job.
            on_step: told after each step. What it raises cancels the job and is raised again.
        Returns: (B, C, Y, X), fp32, on the CPU. What NaN or infinity in an input, or made by the model, comes to; `note`
            then tells at which step it began.
        Raises: InputError, ConfigError, CancelledError, BackendLostError, RankError; NotFiniteError, with `nan_is_error`.
        """
        prompts = {"positive": positive, "negative": negative, "empty": None if perp_neg is None else perp_neg.empty}
        inputs = {"latent": latent, "noise": noise, "noise mask": noise_mask} | _tensors_of(prompts)
        self._begin(inputs)
        of_negative = controls if negative_controls is None else negative_controls
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
            apg,
            None if perp_neg is None else perp_neg.neg_scale,
            None if weaker is None else weaker.guidance,
            step_cache,
        )
        given = self._tensors()
        halves = (torch.float16, torch.bfloat16)  # KSampler rounds its noise to them
        body = Sample(
            self.name,
            spec,
            given.place(latent if latent.dtype in halves else latent.float()),
            given.prompt(positive, controls),
            None if negative is None else given.prompt(negative, of_negative),
            given.in_fp32(noise_mask),
            given.in_fp32(noise),
            given.in_fp32(sigmas),
            None if batch_index is None else list(batch_index),
            preview,
            trace,
            extras=given.extras(extras),
            empty=None if perp_neg is None else given.prompt(perp_neg.empty, ()),
            empty_number=2 if perp_neg is None else perp_neg.number,
            uncond_extras=given.extras(uncond_extras),
            weaker=given.extras(() if weaker is None else weaker.extras),
        )
        callbacks: dict[str, Any] = {"on_event": _telling(on_step), "should_cancel": should_cancel}
        tensors = self._patched_request(body, given.attachments, patches, [*controls, *of_negative], **callbacks)
        self.timeline = tensors[1] if trace else None
        if not is_finite(tensors[0]):
            assert self.last is not None
            step = (0, 0) if self.last.bad_step is None else (self.last.bad_step + 1, self.last.steps)
            self._tell(NotFinite(held_by(inputs), *step))
        return tensors[0]

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
        residuals: Residuals | None = None,
        controls: Sequence[ControlUse] = (),
        extras: Sequence[AnyExtra] = (),
        branches: Sequence[int] = (0,),
        sigma: float | None = None,
        later: Sequence[LaterEvaluation] = (),
        patches: WeightPatches | None = None,
        step: Callable[[], tuple[int, int]] = lambda: (0, 0),
        on_reports: Callable[[Sequence[Tensor]], object] | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Tensor:
        """One exact evaluation: the output, fp32, at the model's own input; rows spread over cfg and dp.

        Args:
            x: (B, C, Y, X), extra channels included. timesteps: (B,), 1000 * sigma for flow models. context: (B, L, E). pooled: (B, A).
            residuals: a ControlNet's, whole, of B rows or one for all, by `input`, `middle` and `output`, each in the order of
                the model's blocks. They travel in the dtype in which the model computes.
            controls: ControlNets in the ranks, on all rows.
            extras: what hangs inside the model, with what doesn't act at `sigma`: what can't be honoured at any step is refused at the
                first. `branches`: which prompt the rows are of, as many for each: 0 cond, 1 uncond.
            sigma: of the noise, where extras act between two; None lets all act.
            later: evaluations of one latent's size that will be asked for: what of them can't be honoured is refused now.
            on_reports: told what those extras that report have of all rows, in their order: (B, N) each, fp32, on the CPU.
            step: asked where the output holds NaN or infinity: of which step, from 1, of how many it is; (0, 0) of none.
        Raises: as `sample`.
        """
        self.note = ""
        given = self._tensors()
        body = Forward(
            self.name,
            given.place(x, shared=True),
            given.place(timesteps.float()),
            given.place(context, kept=True),
            given.place(pooled, kept=True),
            control=given.residuals(residuals or {}),
            controls=[use.named(given.hint) for use in controls],
            extras=given.extras(extras),
            branches=list(branches),
            sigma=sigma,
            later=[msgspec.structs.replace(one, extras=given.extras(one.extras)) for one in later],
        )
        room = x.numel() * torch.float32.itemsize
        callbacks: dict[str, Any] = {"should_cancel": should_cancel, "room": room}
        tensors = self._patched_request(body, given.attachments, patches, controls, **callbacks)
        if not is_finite(tensors[0]):
            prompt = {"conditioning": context, "pooled conditioning": pooled}
            number, steps = step()
            # In a sampling, x has been made: at the first step of what came in, later on the way.
            made = ({"latent": x}, {"latent (or its noise or mask)": x}, {})[min(number, 2)]
            self._tell(NotFinite(held_by(made | prompt), number, steps))
        if on_reports is not None:
            on_reports(tensors[1:])
        return tensors[0]

    def _tensors(self) -> RequestTensors:
        return RequestTensors(getattr(torch, self.load.dtype))


def _telling(on_step: Callable[[Step], None] | None) -> OnEvent:
    def on_event(event: Progress | StepDone, tensors: Sequence[Tensor]) -> None:
        if on_step is not None and isinstance(event, StepDone):
            x, denoised = tensors if tensors else (None, None)
            on_step(Step(event.index, event.total, x, denoised))

    return on_event


def _tensors_of(prompts: Mapping[str, Conditioning | None]) -> dict[str, Tensor]:
    named = {name: prompt for name, prompt in prompts.items() if prompt is not None}
    found = {f"{name} conditioning": prompt.context for name, prompt in named.items()}
    found |= {f"{name} concat": prompt.concat for name, prompt in named.items() if prompt.concat is not None}
    return found | {f"{name} pooled conditioning": prompt.pooled for name, prompt in named.items()}
