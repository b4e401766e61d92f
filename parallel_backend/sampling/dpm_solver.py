"""DPM-Solver in single steps of mixed order, and with steps whose size follows the error that they make.

Source: Lu et al. 2022 (arXiv 2206.00927), algorithms 1 and 2, section 3.4 and appendix C; the step size's controller and all
defaults are k-diffusion's. lambda is -log sigma: with slopes in place of noise, flow models need no other.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .samplers import Evaluation, Run, Sampler, slope

RELATIVE_ERROR, ABSOLUTE_ERROR = 0.05, 0.0078
FIRST_STEP = 0.05
# A step is made again, smaller, where its size should have been less than this share of what it was.
ACCEPTED = 0.81


class _Step(NamedTuple):
    """A step in lambda, from x and its slope d at `start`.

    Rounding must be k-diffusion's: at high sigmas it is all that an error consists of, and sizes the steps.
    """

    x: Tensor
    d: Tensor
    start: Tensor
    end: Tensor

    def h(self, share: float) -> Tensor:
        return share * (self.end - self.start)

    def sigma(self, share: float) -> Tensor:
        return (-(self.end if share == 1 else self.start + self.h(share))).exp()

    def first_order(self, share: float) -> Tensor:
        """x after a share of the step."""
        return self.x - self.sigma(share) * torch.expm1(self.h(share)) * self.d

    def second_order(self, d: Tensor, at: float) -> Tensor:
        """x at the end; `d` is the slope after the share `at`."""
        return self.first_order(1) - self.sigma(1) / (2 * at) * torch.expm1(self.h(1)) * (d - self.d)

    def bent(self, share: float, d: Tensor, at: float) -> Tensor:
        """x after a share of the step, where the slope changes linearly and is `d` after the share `at`."""
        h = self.h(share)
        weight = self.sigma(share) / (at / share) * (torch.expm1(h) / h - 1)
        return self.first_order(share) - weight * (d - self.d)

    def slope_at(self, share: float, x: Tensor, step: int | None = None) -> Generator[Evaluation, Tensor, Tensor]:
        sigma = self.sigma(share)
        denoised = yield Evaluation(x, sigma, step)
        return slope(x, sigma, denoised)

    def third_order(self, step: int | None = None) -> Generator[Evaluation, Tensor, tuple[Tensor, Tensor]]:
        """x at the end by the second and by the third order."""
        d_third = yield from self.slope_at(1 / 3, self.first_order(1 / 3), step)
        d_two_thirds = yield from self.slope_at(2 / 3, self.bent(2 / 3, d_third, 1 / 3))
        return self.second_order(d_third, 1 / 3), self.bent(1, d_two_thirds, 2 / 3)


def dpm_fast(x: Tensor, run: Run) -> Sampler:
    """As many evaluations as the schedule has steps, in steps of third order as far as they go."""
    start, end = _ends(run)
    evaluations = len(run.sigmas) - 1
    whole, rest = divmod(evaluations, 3)
    orders = [3] * whole + [rest] if rest else [3] * (whole - 1) + [2, 1]
    times = torch.linspace(float(start), float(end), len(orders) + 1)
    for i, order in enumerate(orders):
        sigma = (-times[i]).exp()
        denoised = yield Evaluation(x, sigma, i)
        step = _Step(x, slope(x, sigma, denoised), times[i], times[i + 1])
        if order == 1:
            x = step.first_order(1)
        elif order == 2:
            d = yield from step.slope_at(1 / 2, step.first_order(1 / 2))
            x = step.second_order(d, 1 / 2)
        else:
            _, x = yield from step.third_order()
    return x


def dpm_adaptive(x: Tensor, run: Run) -> Sampler:
    """Of the schedule only the ends count. A try is a step for progress: how many there will be nobody knows.

    Each try waits for the device, to learn its error; all ranks go by the first one's.
    """
    at, end = _ends(run)
    forward = bool(end > at)
    size, tries = FIRST_STEP if forward else -FIRST_STEP, 0
    last_low, d = x, None
    while (end - at if forward else at - end) > 1e-5:
        following = (torch.minimum if forward else torch.maximum)(end, at + size)
        known = d is not None
        if d is None:
            denoised = yield Evaluation(x, (-at).exp(), tries)
            d = slope(x, (-at).exp(), denoised)
        step = _Step(x, d, at, following)
        low, high = yield from step.third_order(tries if known else None)
        allowed = (RELATIVE_ERROR * torch.maximum(low.abs(), last_low.abs())).clamp(min=ABSOLUTE_ERROR)
        error = run.agreed(torch.linalg.vector_norm((low - high) / allowed) / x.numel() ** 0.5)
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / 3) - 1)
        size *= factor
        tries += 1
        if factor >= ACCEPTED:
            x, last_low, at, d = high, low, following, None
    return x


def _ends(run: Run) -> tuple[Tensor, Tensor]:
    """lambda at the first sigma, and at the last one that isn't 0."""
    first, last = run.sigmas[0], run.sigmas[-1]
    if last == 0:
        last = run.sigmas[-2]
    if first == 0 or last == 0:
        raise InputError(
            "dpm_fast and dpm_adaptive can't start at sigma 0.", "Use euler, or sigmas that start above 0."
        )
    return -first.log(), -last.log()
