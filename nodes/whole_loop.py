"""The whole loop in the backend, under ComfyUI's own samplers and guiders, where all that they carry is known there.

It stands around ComfyUI's sampling as an outer wrapper of the parallel MODEL. What it doesn't know runs step by step: ComfyUI's loop,
one request for each evaluation.
"""

from __future__ import annotations

import time
from types import FunctionType
from typing import Any

import comfy.model_management as mm
import latent_preview
from comfy.patcher_extension import WrapperExecutor
from comfy.samplers import CFGGuider
from torch import Tensor
from tqdm.auto import tqdm

from ..parallel_backend.client.remote import Step
from ..parallel_backend.rpc.messages import Preview, Result
from .core_memory import WeightsElsewhere, interruptible
from .demo_size import tells_demo_size
from .hung.controlnet import take_over
from .hung.displaced_steps import Displaced, displaced_of
from .hung.extra_cost import ExtraCost
from .hung.loop import Loop, backends_own, read_loop
from .hung.nag_guider import take_forward
from .hung.patches import closed_over
from .hung.refusal import refuse
from .hung.step_cache import step_cache_of
from .node_text import own_text, say

# Callbacks that write into the sampler's own latent: StyleAligned puts its reference there, step by step.
_CHANGING = ("StyleAlignedReferenceSampler.patch.<locals>.callback",)
_EXACT = (
    "Leave out what is named here; or have exact steps: method exact in Mesh Config, displaced off on Parallel Sampler, "
    "no Displaced Steps node."
)


@own_text()
@tells_demo_size
def sample_in_backend(
    executor: WrapperExecutor,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """An OUTER_SAMPLE wrapper. Raises: UnsupportedError: what no path to the backend can honour, or displaced steps or a step cache
    that ComfyUI's loop would have to make."""
    guider: CFGGuider = executor.class_obj
    model = guider.model_patcher
    if not isinstance(model, WeightsElsewhere):  # a pack's own around a MODEL's model, with that one's wrappers
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
    take_forward(guider, model.network)
    model.check()
    local = take_over(guider.conds, model)
    displaced = displaced_of(model)
    loop = read_loop(guider, noise, latent_image, sampler, sigmas, denoise_mask, seed)
    if not isinstance(loop, list) and getattr(callback, "__qualname__", "") in _CHANGING:
        loop = ["a callback that changes the latent between steps"]
    if isinstance(loop, list):
        if displaced is not None:
            refuse(iter(loop), "Displaced steps", _EXACT)
        if step_cache_of(model) is not None:
            refuse(iter(loop), "A step cache", "Leave out what is named here, or the Step Cache node.")
        if (name := backends_own(sampler)) is not None:
            refuse(
                iter(loop),
                f"The sampler {name}, which the backend alone has,",
                "Choose another sampler, or remove what is named here.",
            )
        why = "\n".join([f"step by step: {'; '.join(loop)}", *(f"ComfyUI computes {name}" for name in local)])
        say(why, log=True)
        out = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
        if costs := list(filter(None, map(str, (model.network.control_cost, model.network.extra_cost)))):
            say("\n".join([why, *costs]), log=True)
        return out
    model.register()
    clock = StepClock()
    with tqdm(total=len(sigmas) - 1, disable=disable_pbar) as bar:

        def on_step(step: Step) -> None:
            clock.tick()
            bar.update()
            mm.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback(step.index, step.denoised, step.x, step.total)

        out = _run(model, loop, displaced, preview_for(callback), on_step)
    report = f"{clock.report()}, the whole loop in the backend{price(model.remote.last)}"
    sent = str(ExtraCost().note(loop.extras, evaluations=len(loop.sigmas) - 1))
    say("\n".join(filter(None, [report, sent, model.remote.note])), log=True)
    return out.to(model.load_device)


def _run(model: Any, loop: Loop, displaced: Displaced | None, preview: Preview, on_step: Any) -> Tensor:
    return interruptible(
        model.remote.backend,
        model.remote.sample,
        loop.latent,
        loop.positive,
        loop.negative,
        seed=loop.seed,
        cfg_scale=loop.cfg_scale,
        sampler=loop.sampler,
        model_sampling=loop.model_sampling,
        noise=loop.noise,
        sigmas=loop.sigmas,
        noise_mask=loop.mask,
        step_cache=step_cache_of(model),
        warmup_steps=None if displaced is None else displaced.warmup_steps,
        num_patches=0 if displaced is None else displaced.num_patches,
        patches=model.patches_with(None),
        controls=loop.controls["positive"],
        negative_controls=loop.controls.get("negative", ()),
        extras=loop.extras,
        **loop.functions,
        preview=preview,
        on_step=on_step,
    )


def preview_for(callback: Any) -> Preview:
    """Of which steps a callback needs the latents: ComfyUI's own of none where no preview is shown."""
    if callback is None:
        return "none"
    if not isinstance(callback, FunctionType) or callback.__module__ != latent_preview.__name__:
        return "all"  # a pack's own, of any kind
    seen = closed_over(callback)
    if not {"previewer", "x0_output_dict"} <= seen.keys():
        return "all"
    if seen["previewer"]:
        return "all"
    return "last" if seen["x0_output_dict"] is not None else "none"


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

    def tick(self) -> None:
        self._times.append(time.perf_counter())

    def report(self) -> str:
        if len(self._times) < 2:
            return f"{len(self._times)} step"
        mean = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        return f"{len(self._times)} steps, {mean:.3f} s a step"
