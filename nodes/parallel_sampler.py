"""ParallelSampler: KSampler's inputs, the whole loop in the backend."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import comfy.sample
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..parallel_backend.client.remote import Step
from ..parallel_backend.config import SAMPLERS, SCHEDULERS
from ..parallel_backend.errors import UnsupportedError
from ..parallel_backend.rpc.messages import Result
from .core_memory import interruptible
from .hung.conditioning import sd3_conditioning, sdxl_conditioning
from .hung.loop_patches import loop_patches
from .hung.model_sampling import flow_shift, sampling_patches
from .hung.refusal import ON_KSAMPLER, refuse
from .node_text import say
from .remote_model import RemotePatcher


@dataclass(frozen=True)
class Settings:
    """KSampler's widgets, and how ranks exchange what they share."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float
    displaced: bool = False
    warmup_steps: int = 4
    num_patches: int = 0


def sample(
    model: ModelPatcher, settings: Settings, positive: list[Any], negative: list[Any], latent: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """KSampler's result from one request, and a line about its speed and price.

    Raises: UnsupportedError: not a parallel MODEL, or something on it or its conditioning that the loop can't honour.
    """
    if not isinstance(model, RemotePatcher):
        raise UnsupportedError("ParallelSampler needs a MODEL from a parallel loader.", "Use KSampler for this one.")
    model.refuse_patches()
    refuse(loop_patches(model), "ParallelSampler", ON_KSAMPLER)
    full = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    named = ((positive, "positive"), (negative, "negative"))
    if model.remote.family.startswith("sdxl"):
        refuse(sampling_patches(model), "ParallelSampler", ON_KSAMPLER)
        prompts = [sdxl_conditioning(conditioning, name, model, full) for conditioning, name in named]
        shift = 1.0  # of flow models alone
    else:
        prompts = [sd3_conditioning(conditioning, name) for conditioning, name in named]
        shift = flow_shift(model)
    callback = latent_preview.prepare_callback(model, settings.steps)
    shown = latent_preview.get_previewer(model.load_device, model.model.latent_format) is not None
    clock = StepClock()
    model.register()

    def on_step(step: Step) -> None:
        clock.tick(step)
        mm.throw_exception_if_processing_interrupted()
        callback(step.index, step.denoised, step.x, step.total)

    out = interruptible(
        model.remote.backend,
        model.remote.sample,
        full,
        prompts[0],
        prompts[1],
        seed=settings.seed,
        steps=settings.steps,
        cfg_scale=settings.cfg,
        sampler=settings.sampler_name,
        scheduler=settings.scheduler,
        denoise=settings.denoise,
        shift=shift,
        warmup_steps=settings.warmup_steps if settings.displaced else None,
        num_patches=settings.num_patches if settings.displaced else 0,
        noise_mask=latent.get("noise_mask"),
        batch_index=latent.get("batch_index"),
        preview=shown,
        on_step=on_step,
    )
    rest = {k: v for k, v in latent.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    samples = out.to(device=mm.intermediate_device(), dtype=latent["samples"].dtype)
    return {**rest, "samples": samples}, f"{clock.report()}{price(model.remote.last)}"


def price(result: Result | None) -> str:
    """What the ranks' exchange cost rank 0: its share of the time, if timed, and bytes of each axis. Empty for one rank."""
    if result is None or not result.costs or not result.steps:
        return ""
    waits = [cost.waited for cost in result.costs if cost.waited is not None]
    waited = f"{sum(waits) / result.seconds:.0%} of it waiting for others; " if waits else ""
    sent = ", ".join(f"{cost.axis} {cost.sent_bytes / result.steps / 2**20:.1f} MiB" for cost in result.costs)
    return f"; {waited}sent a step: {sent}"


class StepClock:
    """Seconds between steps, as the client sees them."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def tick(self, step: Step) -> None:
        self._times.append(time.perf_counter())

    def report(self) -> str:
        if len(self._times) < 2:
            return f"{len(self._times)} step"
        mean = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return f"{len(self._times)} steps, {mean:.3f} s a step"


class ParallelSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParallelSampler",
            display_name="Parallel Sampler",
            category="parallel",
            description="KSampler with the whole loop in the backend: one request per picture in place of one per step. "
            "The same latent as KSampler's for the same seed and settings.",
            search_aliases=["ksampler", "multi gpu", "sampler"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Parallel MMDiT or Load Parallel UNet."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed used for the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale; at 1 the negative prompt is not computed.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default="euler",
                    tooltip="As KSampler's. Those not listed run with KSampler on the same MODEL.",
                ),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default="simple", tooltip="As KSampler's."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the start keeps something of the latent: image to image.",
                ),
                io.Boolean.Input(
                    "displaced",
                    default=False,
                    optional=True,
                    tooltip="After the warm-up, ranks go on with what the others had a step ago: bands of a UNet (patch), "
                    "stages of an MMDiT (pp), or its ring. Faster, and not exact.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=4,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Exact steps before displaced ones. More: nearer to exact, and slower.",
                ),
                io.Int.Input(
                    "num_patches",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    tooltip="Displaced steps on pp ranks: parts of the image that flow through the stages. 0: one a stage.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        negative: list[Any],
        latent_image: dict[str, Any],
        **settings: Any,
    ) -> io.NodeOutput:
        latent, report = sample(model, Settings(**settings), positive, negative, latent_image)
        say(report, log=True)
        return io.NodeOutput(latent)
