"""ParallelSampler: KSampler's inputs, and displaced steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..parallel_backend.config import SAMPLERS
from .displaced_steps import displaced_inputs
from .family import not_parallel
from .hung.displaced_steps import USUAL_WARMUP, Displaced, with_displaced
from .hung.loop import in_backend_alone
from .known_to_core import known_to, search_aliases
from .remote_model import RemotePatcher


@dataclass(frozen=True)
class Settings:
    """KSampler's widgets."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float


def sampler_names() -> list[str]:
    """Those of KSampler, and those that the backend alone has."""
    own = [name for name in SAMPLERS if name not in comfy.samplers.SAMPLER_NAMES]
    return [*comfy.samplers.SAMPLER_NAMES, *own]


def sample(
    model: ModelPatcher, settings: Settings, positive: list[Any], negative: list[Any], latent: dict[str, Any]
) -> dict[str, Any]:
    """KSampler's result."""
    fix = comfy.sample.fix_empty_latent_channels
    sizes = known_to(fix, downscale_ratio_spacial=latent.get("downscale_ratio_spacial"))
    samples = fix(model, latent["samples"], **sizes)
    noise = comfy.sample.prepare_noise(samples, settings.seed, latent.get("batch_index"))
    given = {
        "noise_mask": latent.get("noise_mask"),
        "callback": latent_preview.prepare_callback(model, settings.steps),
        "seed": settings.seed,
    }
    named = (settings.steps, settings.cfg, settings.sampler_name, settings.scheduler)
    prompts = (positive, negative, samples)
    if settings.sampler_name in comfy.samplers.SAMPLER_NAMES:
        out = comfy.sample.sample(model, noise, *named, *prompts, denoise=settings.denoise, **given)
    else:
        # ComfyUI's own function takes another sampler for a name that it doesn't know.
        like = comfy.samplers.KSampler(
            model, settings.steps, model.load_device, "euler", settings.scheduler, settings.denoise
        )
        sampler = in_backend_alone(settings.sampler_name)
        out = comfy.sample.sample_custom(model, noise, settings.cfg, sampler, like.sigmas, *prompts, **given)
    rest = {k: v for k, v in latent.items() if k not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    return {**rest, "samples": out}


class ParallelSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParallelSampler",
            display_name="Parallel Sampler",
            category="parallel",
            description="KSampler on a parallel MODEL, with displaced steps as an option: the whole loop in the backend, one "
            "request per picture, where all that hangs on the MODEL is known there. KSampler itself does the same.",
            **search_aliases("ksampler", "multi gpu", "sampler"),
            inputs=[
                io.Model.Input("model", tooltip="A parallel MODEL."),
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
                    options=sampler_names(),
                    default="euler",
                    tooltip="As KSampler's. Those that the backend doesn't have run step by step.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="simple", tooltip="As KSampler's."
                ),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
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
                *displaced_inputs(optional=True),
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
        displaced: bool = False,
        warmup_steps: int = USUAL_WARMUP,
        num_patches: int = 0,
        **settings: Any,
    ) -> io.NodeOutput:
        if not isinstance(model, RemotePatcher):
            raise not_parallel("Parallel Sampler", model, "use KSampler, with ControlNets from ComfyUI's own loader.")
        parallel = with_displaced(model, Displaced(warmup_steps, num_patches)) if displaced else model
        return io.NodeOutput(sample(parallel, Settings(**settings), positive, negative, latent_image))
