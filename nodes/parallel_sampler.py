"""ParallelSampler: KSampler's inputs, the whole loop in the backend."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management as mm
import comfy.sample
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..parallel_backend.config import SAMPLERS, SCHEDULERS
from ..parallel_backend.errors import CancelledError, UnsupportedError
from ..parallel_backend.rpc.remote import Step
from .comfy_types import ON_KSAMPLER, flow_shift, loop_patches, refuse, to_conditioning, weight_patches
from .node_text import say
from .remote_model import RemotePatcher


def sample(
    model: ModelPatcher,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Any],
    negative: list[Any],
    latent: dict[str, Any],
    denoise: float,
) -> tuple[dict[str, Any], str]:
    """KSampler's result from one request, and a line about its speed.

    Raises: UnsupportedError: not a parallel MODEL, or something on it or its conditioning that the loop can't honour.
    """
    if not isinstance(model, RemotePatcher):
        raise UnsupportedError("ParallelSampler needs a MODEL from LoadParallelMMDiT.", "Use KSampler for this one.")
    refuse(weight_patches(model), "ParallelSampler", "Remove those nodes.")
    refuse(loop_patches(model), "ParallelSampler", ON_KSAMPLER)
    prompts = [to_conditioning(c, name) for c, name in ((positive, "positive"), (negative, "negative"))]
    shift = flow_shift(model)
    full = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"))
    callback = latent_preview.prepare_callback(model, steps)
    shown = latent_preview.get_previewer(model.load_device, model.model.latent_format) is not None
    clock = StepClock()

    def on_step(step: Step) -> None:
        clock.tick(step)
        mm.throw_exception_if_processing_interrupted()
        callback(step.index, step.denoised, step.x, step.total)

    try:
        out = model.remote.sample(
            full,
            prompts[0],
            prompts[1],
            seed=seed,
            steps=steps,
            cfg_scale=cfg,
            sampler=sampler_name,
            scheduler=scheduler,
            denoise=denoise,
            shift=shift,
            noise_mask=latent.get("noise_mask"),
            batch_index=latent.get("batch_index"),
            preview=shown,
            on_step=on_step,
            should_cancel=mm.processing_interrupted,
        )
    except CancelledError:
        mm.throw_exception_if_processing_interrupted()
        raise
    rest = {k: v for k, v in latent.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    samples = out.to(device=mm.intermediate_device(), dtype=latent["samples"].dtype)
    return {**rest, "samples": samples}, clock.report()


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
                io.Model.Input("model", tooltip="From Load Parallel MMDiT."),
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
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: list[Any],
        negative: list[Any],
        latent_image: dict[str, Any],
        denoise: float,
    ) -> io.NodeOutput:
        latent, report = sample(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        say(report)
        return io.NodeOutput(latent, ui=ui.PreviewText(report))
