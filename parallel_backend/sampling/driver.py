"""The one loop that runs a sampler: progress, previews, cancel and the mask live here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SamplerSpec
from . import multistep, samplers
from .guidance import Inpaint
from .noise import StepNoise
from .parameterization import Parameterization
from .samplers import Run, Sampler

SAMPLERS_BY_NAME: dict[str, Callable[[Tensor, Run], Sampler]] = {
    "euler": samplers.euler,
    "euler_ancestral": samplers.euler_ancestral,
    "euler_stochastic": samplers.euler_stochastic,
    "heun": samplers.heun,
    "dpm_2": samplers.dpm_2,
    "dpm_2_ancestral": samplers.dpm_2_ancestral,
    "lms": multistep.lms,
    "dpmpp_2s_ancestral": samplers.dpmpp_2s_ancestral,
    "dpmpp_sde": samplers.dpmpp_sde,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde,
    # DDIM (eta 0) is Euler in these variables; ComfyUI keeps the name, and draws its own noise under a mask.
    "ddim": samplers.euler,
    "lcm": samplers.lcm,
    "ddpm": samplers.ddpm,
    "deis": multistep.deis,
    "ipndm": multistep.ipndm,
    "uni_pc": multistep.uni_pc,
    "res_multistep": samplers.res_multistep,
}


@dataclass(frozen=True)
class StepReport:
    """After the first evaluation of step `index` of `total`: x there, and what the model makes of it."""

    index: int
    total: int
    x: Tensor
    denoised: Tensor


def drive(
    denoise: Callable[[Tensor, Tensor, int], Tensor],
    spec: SamplerSpec,
    model: Parameterization,
    sigmas: Tensor,
    *,
    latent: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    mask_noise: Tensor,
    share: Callable[[Tensor], Tensor],
    on_step: Callable[[StepReport], None],
) -> Tensor:
    """The latent at the end of the sigmas.

    Args:
        denoise: (x, sigma, step) -> denoised, guidance included.
        sigmas: descending, on the latent's device.
        latent: what is noised to the first sigma, in the model's scale.
        mask: 1 where the latent may change; None everywhere.
        share: makes a tensor equal on all ranks.
        on_step: called once a step; what it raises ends the run.
    """
    if len(sigmas) < 2:
        return latent
    if spec.sampler == "uni_pc" and sigmas[-1] == 0:
        sigmas = torch.cat([sigmas[:-1], sigmas.new_tensor([multistep.UNI_PC_END])])
    keep = None if mask is None else Inpaint(mask, latent, mask_noise, model)
    x = model.start(latent, noise, sigmas[0])
    run = Run(sigmas, StepNoise(x, sigmas, spec.seed, share), model)
    sampler = SAMPLERS_BY_NAME[spec.sampler](x, run)
    wanted, step = next(sampler), 0
    while True:
        step = step if wanted.step is None else wanted.step
        x = wanted.x if keep is None else keep.before(wanted.x, wanted.sigma)
        denoised = denoise(x, wanted.sigma, step)
        if keep is not None:
            denoised = keep.after(denoised)
        if wanted.step is not None:
            on_step(StepReport(wanted.step, len(sigmas) - 1, wanted.x, denoised))
        try:
            wanted = sampler.send(denoised)
        except StopIteration as end:
            return model.finish(end.value, sigmas[-1])
