"""One sampling request from latent to latent: noise, schedule, guidance, the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import BranchName, SamplerSpec
from ..errors import InputError
from .brownian import Interval
from .driver import Pipeline, StepReport, drive
from .guidance import Guidance
from .inpainting import mask_for
from .noise import StepNoise, initial_noise
from .parameterization import Parameterization
from .schedules import sigmas_for

Outputs = Callable[[Tensor, Tensor, int, Tensor], Sequence[Tensor]]


def sample_latent(
    outputs: Outputs,
    spec: SamplerSpec,
    model: Parameterization,
    *,
    latent: Tensor,
    branches: Sequence[BranchName] = ("cond", "uncond"),
    mask: Tensor | None = None,
    noise: Tensor | None = None,
    sigmas: Tensor | None = None,
    batch_index: Sequence[int] | None = None,
    noise_dtype: torch.dtype = torch.float32,
    share: Callable[[Tensor], Tensor] = lambda x: x,
    on_schedule: Callable[[Sequence[Tensor]], None] = lambda timesteps: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    pipeline: Pipeline | None = None,
    draw_ahead: bool | None = None,
) -> Tensor:
    """The sampled latent, in the model's scale.

    Args:
        outputs: (model's input, timestep, step, sigma) -> the model's output for cond and, with guidance, other `branches`.
        latent: (B, C, Y, X), fp32, on the device that computes.
        noise: start noise; None draws it from the seed.
        sigmas: in place of the scheduler's; None makes them. The model is asked with these, on the CPU. They may rise
            where the sampler can go that way, as those that take a picture back to its noise do. None at all: the latent
            comes back as it is.
        batch_index: which draws of the seed's stream the rows get; one draw goes to all.
        noise_dtype: what the drawn noise is rounded to, as KSampler rounds it to the latent's.
        on_schedule: told the timesteps of all steps before the first, on the CPU; samplers may ask at others in between.
        pipeline: for displaced steps, where patches flow through stages.
        draw_ahead: whether a thread draws Brownian noise ahead; None where a GPU leaves the CPU the time.
    Raises: InputError: noise, sigmas or batch_index that don't fit the latent.
    """
    device = latent.device
    if noise is not None and noise.shape != latent.shape:
        raise InputError(f"Noise of {list(noise.shape)} for a latent of {list(latent.shape)}.", "Give equal shapes.")
    if batch_index is not None and (len(batch_index) not in (1, latent.shape[0]) or min(batch_index) < 0):
        raise InputError(f"batch_index {list(batch_index)} for {latent.shape[0]} latents.", "Name one draw per latent.")
    if noise is None:
        noise = initial_noise(latent.shape, spec.seed, batch_index).to(noise_dtype).float().expand(latent.shape)
    # They stay on the CPU: what is read of them then never waits for a GPU, and as numbers of its kernels they cost it
    # nothing. A GPU takes one reciprocal for a division by such a number: the last bit may differ.
    sigmas = sigmas_for(spec, model) if sigmas is None else check_sigmas(sigmas, spec, model)
    if len(sigmas) == 0:
        return latent
    on_schedule([model.timestep(sigma) for sigma in sigmas[:-1]])
    noise = noise.to(device)
    # ComfyUI's ddim draws the noise of the masked part from the next seed.
    mask_noise = initial_noise(latent.shape, (spec.seed + 1) % 2**64).to(device) if spec.sampler == "ddim" else noise

    ahead = device.type == "cuda" if draw_ahead is None else draw_ahead
    with StepNoise(latent, sigmas, spec.seed, share, ahead=ahead) as noise_of_steps:
        return drive(
            outputs,
            spec,
            model,
            sigmas,
            guidance=Guidance(spec, model, branches),
            latent=latent,
            noise=noise,
            mask=None if mask is None else mask_for(mask, latent),
            mask_noise=mask_noise,
            noise_of_steps=noise_of_steps,
            agreed=lambda number: float(share(number)),
            on_step=on_step,
            pipeline=pipeline,
        )


def check_sigmas(sigmas: Tensor, spec: SamplerSpec, model: Parameterization) -> Tensor:
    """Those that were given, fp32 on the CPU.

    Raises: InputError: they are no sigmas, or the sampler can't go through them.
    """
    sigmas = sigmas.float().cpu()
    if sigmas.ndim != 1 or not torch.isfinite(sigmas).all() or (sigmas < 0).any():
        raise InputError(f"Sigmas {sigmas.tolist()[:6]} can't be used.", "Give a list of finite numbers, 0 or more.")
    falls = len(sigmas) > 1 and bool((sigmas.diff() < 0).all())
    if len(sigmas) > 0 and not falls and not _goes_through(sigmas, spec, model):
        raise InputError(
            f"Sampler {spec.sampler} can't go through sigmas {sigmas.tolist()[:6]}, which don't fall all the way.",
            "Let them fall, or use euler; a flow model's can't end at 1, where there is noise alone.",
        )
    return sigmas


class _Still:
    """Noise without chance."""

    def gaussian(self) -> Tensor:
        return torch.ones(1, 1, 1, 1)

    def foresee(self, intervals: Sequence[Interval]) -> None:
        pass

    def brownian(self, sigma_from: Tensor, sigma_to: Tensor) -> Tensor:
        return self.gaussian()


def _goes_through(sigmas: Tensor, spec: SamplerSpec, model: Parameterization) -> bool:
    """Whether a latent of one value comes out finite, of a model that is a straight line.

    Roots of what is below 0, and divisions by a step of no length, are the same for every latent.
    """
    one = torch.ones(1, 1, 1, 1)
    try:
        end = drive(
            lambda x, *_: [0.1 * x + 0.2],
            spec,
            model,
            sigmas,
            guidance=Guidance(spec, model),
            latent=one,
            noise=one,
            mask=None,
            mask_noise=one,
            noise_of_steps=_Still(),
            agreed=float,
            on_step=lambda report: None,
        )
    except (ArithmeticError, ValueError, torch.linalg.LinAlgError):  # of what samplers compute in plain numbers
        return False
    return bool(torch.isfinite(end).all())
