"""Our step beside diffusers' on the same weights in the same run, and beside ComfyUI's KSampler where its checkout is carried."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comfyui.installation import ComfyInstallation, find_installation
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from local_network import local_network
from reference_models import diffusers_mmdit
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend.bench.device_time import synchronize, timed
from parallel_backend.config import MeshSpec, SamplerSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import EXACT
from parallel_backend.models.families import SD3
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Discrete, Flow, Parameterization

from ..options import ROOT, Options
from ..report import Report
from ..sizes import Sizes, dtype_name, sizes_of
from ..weights import (
    diffusers_unet,
    mmdit_predictor,
    mmdit_tensors,
    relative_error,
    sd3_prompts,
    sdxl_prompts,
    unet_predictor,
    unet_tensors,
)
from .loading import write_sd35

CFG, SHIFT = 4.5, 3.0
# A run's fixed costs leave a step's time by taking the shorter from the longer.
SHORT, LONG = 2, 8


@torch.inference_mode()
def run(report: Report, options: Options) -> None:
    device, sizes = torch.device(options.device), sizes_of(options)
    dtype = sizes.dtypes[0]
    report.table(
        f"Beside diffusers, guidance, one GPU, {dtype_name(dtype)}, {sizes.side} px", "what", "ms", "differs from ours"
    )
    _sd35(report, sizes, device, dtype)
    _sdxl(report, sizes, device, dtype)
    _comfyui(report, options, sizes, device)


def _sd35(report: Report, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    tensors = mmdit_tensors(sizes.mmdit, device, dtype)
    ours = mmdit_predictor(tensors, sizes.mmdit, device, dtype)
    theirs = diffusers_mmdit(sizes.mmdit, tensors)
    prompts = sd3_prompts(sizes.text, device, dtype)
    both = _joined(prompts)
    x = torch.randn(1, sizes.mmdit.channels, sizes.cells, sizes.cells, device=device)

    def model(latents: Tensor, timestep: Tensor) -> Tensor:
        times = timestep.expand(len(latents))
        pair = {"encoder_hidden_states": both.context, "pooled_projections": both.pooled}
        return theirs(latents.to(dtype), timestep=times, return_dict=False, **pair)[0]

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    _compare(report, "SD3.5-Large", sizes, ours, prompts, x, Flow(SHIFT), {"diffusers": model}, scheduler)


def _sdxl(report: Report, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    tensors = unet_tensors(sizes.unet, device, dtype)
    ours = unet_predictor(tensors, sizes.unet, device, dtype)
    prompts = sdxl_prompts(sizes.unet, device, dtype)
    both = _joined(prompts)
    x = torch.randn(1, sizes.unet.channels, sizes.cells, sizes.cells, device=device)

    def model_of(unet: Any) -> Callable[[Tensor, Tensor], Tensor]:
        pair = {"encoder_hidden_states": both.context, "class_labels": both.pooled}
        return lambda latents, timestep: unet(latents.to(dtype), timestep, return_dict=False, **pair)[0]

    theirs = {"diffusers": model_of(diffusers_unet(tensors, sizes.unet))}
    last = diffusers_unet(tensors, sizes.unet).to(memory_format=torch.channels_last)
    theirs["diffusers, channels last"] = model_of(last)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    _compare(report, "SDXL", sizes, ours, prompts, x, Discrete(), theirs, scheduler)


def _joined(prompts: list[Prompt]) -> Prompt:
    """Uncond before cond, as diffusers' pipelines have them."""
    return Prompt(*(torch.cat([getattr(p, name) for p in reversed(prompts)]) for name in ("context", "pooled")))


def _compare(
    report: Report,
    name: str,
    sizes: Sizes,
    ours: Predictor,
    prompts: list[Prompt],
    x: Tensor,
    parameterization: Parameterization,
    theirs: dict[str, Callable[[Tensor, Tensor], Tensor]],
    scheduler: Any,
) -> None:
    """An evaluation of two rows, and a step of a run of several: guidance, scheduler and all."""
    device, timestep = x.device, torch.tensor(500.0)  # ours takes it on the CPU, theirs on the device

    def row(what: str, call: Callable[[], object], differs: float | None) -> None:
        report.row(f"{name}, {what}", timed(call, device, sizes.warm_up, sizes.repeats).whole, differs)

    share = ours.share(len(x), prompts)
    expected = torch.cat(ours.outputs(x, timestep, share, EXACT)[::-1])
    row("ours, an evaluation", lambda: ours.outputs(x, timestep, share, EXACT), None)
    twice = torch.cat([x, x])
    for who, model in theirs.items():
        call = partial(model, twice, timestep.to(device))
        row(f"{who}, an evaluation", call, relative_error(call(), expected))

    def our_run(steps: int) -> None:
        spec = SamplerSpec(steps=steps, cfg_scale=CFG, scheduler="normal")
        sample_latent(
            lambda x, t, *_: ours.outputs(x, t, share, EXACT), spec, parameterization, latent=torch.zeros_like(x)
        )

    report.row(f"{name}, ours, a step", _step(our_run, device), None)
    for who, model in theirs.items():
        report.row(f"{name}, {who}, a step", _step(partial(_their_run, model, scheduler, x), device), None)


def _their_run(model: Callable[[Tensor, Tensor], Tensor], scheduler: Any, x: Tensor, steps: int) -> Tensor:
    """What diffusers' pipelines do between prompt and decode: double, scale, call, guide, step."""
    scheduler.set_timesteps(steps, device=x.device)
    latents = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        seen = torch.cat([latents, latents])
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(seen, timestep)
        uncond, cond = model(seen, timestep).chunk(2)
        latents = scheduler.step(uncond + CFG * (cond - uncond), timestep, latents, return_dict=False)[0]
    return latents


def _step(run_steps: Callable[[int], object], device: torch.device) -> float:
    """Milliseconds of a step of a run, its beginning and end left out."""
    spent = {}
    for steps in (SHORT, SHORT, LONG):  # the first warms up
        synchronize(device)
        begun = time.perf_counter()
        run_steps(steps)
        synchronize(device)
        spent[steps] = time.perf_counter() - begun
    return (spent[LONG] - spent[SHORT]) / (LONG - SHORT) * 1000


def _comfyui(report: Report, options: Options, sizes: Sizes, device: torch.device) -> None:
    """KSampler in ComfyUI's own process, in the dtype that it chooses, and ours in that dtype on the same file."""
    comfy = find_installation()
    report.table(
        f"Beside ComfyUI's KSampler, euler, {sizes.side} px", "what", "dtype", "ms a step", "differs from ours"
    )
    if isinstance(comfy, str):
        report.row(comfy)
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    path = write_sd35(options, device)
    prompts = sd3_prompts(sizes.text, torch.device("cpu"), torch.float32)
    given = {f"{w}.{n}": getattr(p, n) for w, p in zip(("cond", "uncond"), prompts) for n in ("context", "pooled")}
    latent = torch.zeros(1, sizes.mmdit.channels, sizes.cells, sizes.cells)
    theirs, said = _ksampler(comfy, options, path, given | {"latent": latent})
    dtype = getattr(torch, said["dtype"])
    network = local_network(path, build_mesh(MeshSpec()), device, dtype)
    ours = Predictor(network, build_mesh(MeshSpec()), dtype, device, SD3)
    share = ours.share(1, [Prompt(p.context.to(device, dtype), p.pooled.to(device, dtype)) for p in prompts])

    def our_run(steps: int) -> Tensor:
        spec = SamplerSpec(steps=steps, cfg_scale=CFG, seed=1, shift=SHIFT)
        outputs = lambda x, t, *_: ours.outputs(x, t, share, EXACT)  # noqa: E731
        out = sample_latent(outputs, spec, Flow(SHIFT), latent=latent.to(device))
        return out / SD3.scale + SD3.shift

    report.row("ours", said["dtype"], _step(our_run, device), None)
    report.row("ComfyUI's KSampler", said["dtype"], said["ms"], relative_error(theirs, our_run(LONG).cpu()))


def _ksampler(
    comfy: ComfyInstallation, options: Options, path: Any, given: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """KSampler's latent of the longer run; its dtype and milliseconds a step."""
    inputs, out = options.scratch / "ksampler.in.safetensors", options.scratch / "ksampler.out.safetensors"
    save_file(given, inputs)
    settings = json.dumps({"cfg": CFG, "shift": SHIFT, "short": SHORT, "long": LONG, "device": options.device})
    script = ROOT / "benchmarks" / "gpu" / "ksampler_step.py"
    command = [comfy.python, script, comfy.folder, path, inputs, out, settings]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    return load_file(out)["latent"], json.loads(done.stdout.splitlines()[-1])
