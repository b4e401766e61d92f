"""The sigmas of a run, descending, the last one usually 0. Named as ComfyUI names them.

Sources: karras: Karras et al. 2022, equation 5. kl_optimal: Sabour et al. 2024 (arXiv 2404.14507), section 3.
beta: Lee et al. 2024 (arXiv 2407.12173). linear_quadratic: Movie Gen (arXiv 2410.13720), section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..config import SCHEDULERS, SamplerSpec, choose
from .parameterization import Parameterization

# These drop the last but one sigma of a schedule that is one step longer.
_DROP_PENULTIMATE = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})


def sigmas_for(spec: SamplerSpec, model: Parameterization) -> Tensor:
    """The sigmas of `spec`, fp32: steps + 1 of them, fewer where the scheduler has fewer to give.

    With denoise below 1, the schedule is made for int(steps / denoise) steps, and its end is kept: none of it at 0.
    """
    if spec.denoise == 0:
        return torch.empty(0)
    if spec.denoise > 0.9999:
        return _full_schedule(spec, spec.steps, model)
    return _full_schedule(spec, int(spec.steps / spec.denoise), model)[-(spec.steps + 1) :]


def _full_schedule(spec: SamplerSpec, steps: int, model: Parameterization) -> Tensor:
    drop = spec.sampler in _DROP_PENULTIMATE
    sigmas = SCHEDULES[choose(spec.scheduler, SCHEDULERS, "Scheduler")](model, steps + drop)
    return torch.cat([sigmas[:-2], sigmas[-1:]]) if drop else sigmas


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.float(), torch.zeros(1)])


def simple(model: Parameterization, steps: int) -> Tensor:
    """Every (1000 / steps)-th of the model's sigmas, from the largest down."""
    table = model.sigmas
    stride = len(table) / steps
    return _with_zero(torch.stack([table[-(1 + int(i * stride))] for i in range(steps)]))


def ddim_uniform(model: Parameterization, steps: int) -> Tensor:
    """Every (1000 // steps)-th of the model's sigmas, from the second smallest up."""
    table = model.sigmas
    if math.isclose(float(table[1]), 0, abs_tol=1e-5):
        return table[1 :: max(len(table) // (steps + 1), 1)].flip(0)
    return _with_zero(table[1 :: max(len(table) // steps, 1)].flip(0))


def _evenly_timed(model: Parameterization, count: int, keep: int) -> Tensor:
    first, last = (model.timestep(model.sigmas[i]) for i in (-1, 0))
    times = torch.linspace(float(first), float(last), count)[:keep]
    return model.sigma(times)


def normal(model: Parameterization, steps: int) -> Tensor:
    """Evenly spaced timesteps, both ends of the table included."""
    if math.isclose(float(model.sigma(model.timestep(model.sigmas[0]))), 0, abs_tol=1e-5):
        return _evenly_timed(model, steps + 1, steps + 1)
    return _with_zero(_evenly_timed(model, steps, steps))


def sgm_uniform(model: Parameterization, steps: int) -> Tensor:
    """Evenly spaced timesteps, the smallest replaced by 0."""
    return _with_zero(_evenly_timed(model, steps + 1, steps))


def karras(model: Parameterization, steps: int, rho: float = 7.0) -> Tensor:
    """Evenly spaced in sigma^(1 / rho)."""
    low, high = (float(model.sigmas[i]) ** (1 / rho) for i in (0, -1))
    ramp = torch.linspace(0, 1, steps)
    return _with_zero((high + ramp * (low - high)) ** rho)


def exponential(model: Parameterization, steps: int) -> Tensor:
    """Evenly spaced in log sigma."""
    low, high = (math.log(float(model.sigmas[i])) for i in (0, -1))
    return _with_zero(torch.linspace(high, low, steps).exp())


def beta(model: Parameterization, steps: int, alpha: float = 0.6) -> Tensor:
    """Quantiles of a symmetric beta distribution over the table; repeated entries are dropped."""
    from scipy.stats import beta as beta_distribution  # half a second, which ranks spend when a job needs it

    quantiles = beta_distribution.ppf(1 - np.linspace(0, 1, steps, endpoint=False), alpha, alpha)
    chosen = dict.fromkeys(int(i) for i in np.rint(quantiles * (len(model.sigmas) - 1)))
    return _with_zero(model.sigmas[list(chosen)])


def linear_quadratic(model: Parameterization, steps: int, threshold: float = 0.025) -> Tensor:
    """Noise falls linearly by `threshold` in the first half of the steps, then quadratically to 0.

    The quadratic meets the line in value and in slope where they join.
    """
    largest = model.sigmas[-1]
    if steps == 1:
        return torch.tensor([1.0, 0.0]) * largest
    linear, rest = steps // 2, steps - steps // 2
    slope = threshold / linear
    curvature = (1 - threshold - slope * rest) / rest**2
    progress = [slope * i for i in range(linear)]
    progress += [threshold + slope * i + curvature * i**2 for i in range(rest)]
    return torch.tensor([1 - p for p in progress] + [0.0], dtype=torch.float32) * largest


def kl_optimal(model: Parameterization, steps: int) -> Tensor:
    """Evenly spaced in the arc tangent of sigma."""
    low, high = (math.atan(float(model.sigmas[i])) for i in (0, -1))
    ramp = torch.arange(steps, dtype=torch.float32) / max(steps - 1, 1)
    return _with_zero((ramp * low + (1 - ramp) * high).tan())


SCHEDULES: dict[str, Callable[[Parameterization, int], Tensor]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "normal": normal,
    "karras": karras,
    "exponential": exponential,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "linear_quadratic": linear_quadratic,
    "kl_optimal": kl_optimal,
}
