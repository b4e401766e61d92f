"""The one loop that runs a sampler: progress, previews, cancel and the mask live here, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import SamplerSpec
from . import dpm_solver, exponential, multistep, samplers, stochastic_adams
from .guidance import Guidance
from .inpainting import Gradual, Inpaint
from .noise import Noise, SharedNoise
from .parameterization import Parameterization
from .samplers import Evaluation, Run, Sampler

SAMPLERS_BY_NAME: dict[str, Callable[[Tensor, Run], Sampler]] = {
    "euler": samplers.euler,
    "euler_ancestral": samplers.euler_ancestral,
    "euler_stochastic": samplers.euler_stochastic,
    "heun": samplers.heun,
    "heunpp2": samplers.heunpp2,
    "exp_heun_2_x0": exponential.exp_heun_2_x0,
    "exp_heun_2_x0_sde": exponential.exp_heun_2_x0_sde,
    "dpm_2": samplers.dpm_2,
    "dpm_2_ancestral": samplers.dpm_2_ancestral,
    "dpm_fast": dpm_solver.dpm_fast,
    "dpm_adaptive": dpm_solver.dpm_adaptive,
    "lms": multistep.lms,
    "dpmpp_2s_ancestral": samplers.dpmpp_2s_ancestral,
    "dpmpp_sde": samplers.dpmpp_sde,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": samplers.dpmpp_2m_sde_heun,
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde,
    # DDIM (eta 0) is Euler in these variables; ComfyUI keeps the name, and draws its own noise under a mask.
    "ddim": samplers.euler,
    "lcm": samplers.lcm,
    "ddpm": samplers.ddpm,
    "deis": multistep.deis,
    "ipndm": multistep.ipndm,
    "uni_pc": multistep.uni_pc,
    "uni_pc_bh2": multistep.uni_pc_bh2,
    "gradient_estimation": multistep.gradient_estimation,
    "res_multistep": exponential.res_multistep,
    "res_multistep_ancestral": exponential.res_multistep_ancestral,
    "er_sde": exponential.er_sde,
    "seeds_2": exponential.seeds_2,
    "seeds_3": exponential.seeds_3,
    "sa_solver": stochastic_adams.sa_solver,
    "sa_solver_pece": stochastic_adams.sa_solver_pece,
}


@dataclass(frozen=True)
class StepReport:
    """After the first evaluation of step `index` of `total`: x there, and what the model makes of it."""

    index: int
    total: int
    x: Tensor
    denoised: Tensor


class Pipeline(Protocol):
    """Stages that patches of the latent flow through, after the exact steps."""

    first_step: int
    rows: list[slice]

    @property
    def runs_samplers(self) -> bool: ...
    def begin(self, timestep: Tensor, /) -> None: ...
    def submit(self, patch: int, x: Tensor, /) -> None: ...
    def collect(self, patch: int, /) -> list[Tensor]: ...
    def follow(self, timesteps: Sequence[Tensor], /) -> None: ...
    def finish(self, x: Tensor, /) -> Tensor: ...


class Patch:
    """Rows of the latent with a sampler of their own, and where it stands."""

    def __init__(self, sampler: Sampler, keep: Inpaint | None) -> None:
        self._sampler, self._keep = sampler, keep
        self.wanted: Evaluation
        self.result: Tensor | None = None
        self._go_on(None)

    def input(self) -> Tensor:
        """What the model is to see."""
        wanted = self.wanted
        return wanted.x if self._keep is None else self._keep.before(wanted.x, wanted.sigma)

    def take(self, denoised: Tensor) -> Tensor:
        """Goes on with what the model has made of the input; returns it, the mask heeded."""
        denoised = denoised if self._keep is None else self._keep.after(denoised, self.wanted.sigma)
        self._go_on(denoised)
        return denoised

    def _go_on(self, denoised: Tensor | None) -> None:
        try:
            self.wanted = next(self._sampler) if denoised is None else self._sampler.send(denoised)
        except StopIteration as end:
            self.result = end.value


def drive(
    outputs: Callable[[Tensor, Tensor, int, Tensor], Sequence[Tensor]],
    spec: SamplerSpec,
    model: Parameterization,
    sigmas: Tensor,
    *,
    guidance: Guidance,
    latent: Tensor,
    noise: Tensor,
    mask: Tensor | None,
    mask_noise: Tensor,
    noise_of_steps: Noise,
    agreed: Callable[[Tensor], float],
    on_step: Callable[[StepReport], None],
    pipeline: Pipeline | None = None,
) -> Tensor:
    """The latent at the end of the sigmas.

    Args:
        outputs: (model's input, timestep, step, sigma) -> the model's output for each branch of the guidance.
        sigmas: one or more, on the CPU whatever the latent's device: no step waits to read them.
        latent: what is noised to the first sigma, in the model's scale.
        mask: 1 where the latent may change; None everywhere.
        noise_of_steps: what samplers add between steps.
        agreed: a number of the latent's device as every rank is to see it.
        on_step: called once a step; what it raises ends the run.
        pipeline: takes over from its first step on. The steps before it are those of one patch.
    """
    if len(sigmas) == 1:
        return model.finish(model.start(latent, noise, sigmas[0]), sigmas[0])
    gradual = None if spec.differential is None else Gradual(sigmas, spec.differential, model)
    keep = None if mask is None else Inpaint(mask, latent, mask_noise, model, gradual)
    if spec.sampler in ("uni_pc", "uni_pc_bh2") and sigmas[-1] == 0:
        sigmas = torch.cat([sigmas[:-1], sigmas.new_tensor([multistep.UNI_PC_END])])
    x = model.start(latent, noise, sigmas[0])
    steps = len(sigmas) - 1
    draws = SharedNoise(noise_of_steps)  # for several patches
    rows_of = [slice(None)] if pipeline is None else pipeline.rows
    patches = []
    for rows in rows_of:
        own_noise = noise_of_steps if pipeline is None else draws.of(rows)
        sampler = SAMPLERS_BY_NAME[spec.sampler](x[:, :, rows], Run(sigmas, own_noise, model, agreed))
        patches.append(Patch(sampler, None if keep is None else keep.of(rows)))

    step = 0
    while patches[0].result is None:
        wanted = patches[0].wanted
        step = step if wanted.step is None else wanted.step
        if pipeline is not None and step == pipeline.first_step:
            draws.draw_ahead(steps)
            if pipeline.runs_samplers:
                _flow(pipeline, patches, model, sigmas, guidance, on_step)
            else:
                pipeline.follow([model.timestep(sigma) for sigma in sigmas[step:-1]])
            break
        sigma = wanted.sigma
        seen = torch.cat([patch.input() for patch in patches], dim=2)
        out = outputs(model.model_input(seen, sigma), model.timestep(sigma), step, sigma)
        denoised = guidance(seen, sigma, out)
        reported = torch.cat([patch.wanted.x for patch in patches], dim=2) if wanted.step is not None else None
        denoised = torch.cat(
            [patch.take(denoised[:, :, rows]) for patch, rows in zip(patches, rows_of, strict=True)], dim=2
        )
        if reported is not None:
            on_step(StepReport(step, steps, reported, denoised))
    results = [patch.result for patch in patches if patch.result is not None]
    x = torch.cat(results, dim=2) if results else torch.empty_like(latent)
    return model.finish(x if pipeline is None else pipeline.finish(x), sigmas[-1])


def _flow(
    pipeline: Pipeline,
    patches: Sequence[Patch],
    model: Parameterization,
    sigmas: Tensor,
    guidance: Guidance,
    on_step: Callable[[StepReport], None],
) -> None:
    """The displaced steps on the first stage: a patch enters a step as soon as it has left the one before."""
    first, steps = pipeline.first_step, len(sigmas) - 1
    seen: list[Tensor] = []
    denoised: list[Tensor] = []

    def take(index: int, step: int) -> None:
        patch = patches[index]
        x, sigma = patch.input(), patch.wanted.sigma
        seen.append(patch.wanted.x)
        denoised.append(patch.take(guidance(x, sigma, pipeline.collect(index))))
        if len(seen) == len(patches):
            report = StepReport(step, steps, torch.cat(seen, dim=2), torch.cat(denoised, dim=2))
            seen.clear()
            denoised.clear()
            on_step(report)

    for step in range(first, steps):
        pipeline.begin(model.timestep(sigmas[step]))
        for index, patch in enumerate(patches):
            if step > first:
                take(index, step - 1)
            pipeline.submit(index, model.model_input(patch.input(), patch.wanted.sigma))
    for index in range(len(patches)):
        take(index, steps - 1)
