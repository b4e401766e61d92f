"""Samplers that extrapolate from the evaluations of earlier steps.

Sources: lms: Adams-Bashforth on uneven steps, as k-diffusion has it. ipndm and deis: Zhang and Chen 2022
(arXiv 2204.13902), the second in its "tAB" form. uni_pc: Zhao et al. 2023 (arXiv 2302.04867), data prediction, B1(h) and
B2(h). gradient_estimation: Permenter and Yuan 2024 (arXiv 2306.04848), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .samplers import Evaluation, Run, Sampler, slope

UNI_PC_END = 0.001
_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def lms(x: Tensor, run: Run, order: int = 4) -> Sampler:
    from scipy import integrate  # half a second and 30 MB, which ranks spend when a job needs it

    times = run.sigmas.double().tolist()
    slopes: list[Tensor] = []
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        slopes = [slope(x, sigma, denoised), *slopes[: order - 1]]
        if following == 0:
            x = denoised
        else:
            nodes = times[max(0, i - order + 1) : i + 1][::-1]
            for j, d in enumerate(slopes):
                weight = integrate.quad(_lagrange, times[i], times[i + 1], args=(nodes, j), epsrel=1e-4)[0]
                x = x + weight * d
    return x


def _lagrange(t: float | Tensor, nodes: list[float], j: int) -> float | Tensor:
    """The polynomial that is 1 at nodes[j] and 0 at the other nodes, at t."""
    value: float | Tensor = 1.0
    for k, node in enumerate(nodes):
        if k != j:
            value = value * (t - node) / (nodes[j] - node)
    return value


def ipndm(x: Tensor, run: Run) -> Sampler:
    slopes: list[Tensor] = []
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        slopes = [slope(x, sigma, denoised), *slopes[:3]]
        if following == 0:
            x = denoised
        else:
            weights = _ADAMS_BASHFORTH[len(slopes) - 1]
            x = x + (following - sigma) * sum(w * d for w, d in zip(weights, slopes, strict=True))
    return x


def deis(x: Tensor, run: Run, order: int = 3) -> Sampler:
    times = [_vp_time(s) for s in run.sigmas.double().tolist()]
    slopes: list[Tensor] = []
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        slopes = [slope(x, sigma, denoised), *slopes[: order - 1]]
        if following <= 0 or len(slopes) == 1:
            x = x + (following - sigma) * slopes[0]
        else:
            weights = _deis_weights(times[max(0, i - order + 1) : i + 1][::-1], times[i], times[i + 1])
            x = x + sum(w * d for w, d in zip(weights, slopes, strict=True))
    return x


# The variance-preserving time in which DEIS fits its polynomials, for sigmas from 0.002 (t = 0.001) to 80 (t = 1).
_LOG_LOW, _LOG_HIGH = math.log(0.002**2 + 1), math.log(80**2 + 1)
_BETA_SLOPE = 2 * (_LOG_LOW / 1e-3 - _LOG_HIGH) / (1e-3 - 1)
_BETA_MIN = _LOG_HIGH - 0.5 * _BETA_SLOPE


def _vp_time(sigma: float) -> float:
    return (math.sqrt(_BETA_MIN**2 + 2 * _BETA_SLOPE * math.log(sigma**2 + 1)) - _BETA_MIN) / _BETA_SLOPE


def _deis_weights(nodes: list[float], start: float, stop: float, points: int = 10_000) -> list[float]:
    """Integrals over dsigma of the Lagrange polynomials in t, by the reference's sum over `points` times."""
    t = torch.linspace(start, stop, points, dtype=torch.float64)
    log_alpha = -0.5 * t**2 * _BETA_SLOPE - t * _BETA_MIN
    alpha = log_alpha.exp()
    dsigma_dt = 0.5 * (t * _BETA_SLOPE + _BETA_MIN) / (alpha * (1 - alpha)).sqrt()
    dt = (stop - start) / points
    return [float((dsigma_dt * _lagrange(t, nodes, j)).sum()) * dt for j in range(len(nodes))]


def gradient_estimation(x: Tensor, run: Run, gamma: float = 2.0) -> Sampler:
    previous: Tensor | None = None
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        d = slope(x, sigma, denoised)
        if following == 0:
            x = denoised
        else:
            estimate = d if previous is None else gamma * d + (1 - gamma) * previous
            x = x + estimate * (following - sigma)
        previous = d
    return x


def uni_pc(x: Tensor, run: Run, scale_of: Callable[[Tensor], Tensor] = torch.neg) -> Sampler:
    """Predict with the last evaluations, evaluate there, correct; orders rise to 3 and fall to 1 at the end.

    `run.sigmas` ends at UNI_PC_END or higher: the log-SNR must be finite. Works in the variance-preserving x.

    Args:
        scale_of: the paper's B(h), negative here as h is that of data prediction.
    """
    steps = len(run.sigmas) - 1
    if steps < 2:
        raise ConfigError("uni_pc can't run in a single step.", "Use 2 steps or more, or another sampler.")
    highest = min(3, steps - 1)
    times = _VpTimes.of(run.sigmas)
    scales = (1 + run.sigmas**2).sqrt()
    x = x / scales[0]
    past: list[tuple[int, Tensor]] = []
    for i in range(steps):
        if i == 0:
            past = [(0, (yield Evaluation(x * scales[0], run.sigmas[0], 0)))]
            continue
        order = min(highest, steps + 1 - i) if i >= highest else i
        step = _UniPcStep.plan(x, past[:order], times, i, scale_of)
        denoised = yield Evaluation(step.predicted * scales[i], run.sigmas[i], i)
        x = step.corrected(denoised)
        past = [(i, denoised), *past[: highest - 1]]
    return _UniPcStep.plan(x, past[:1], times, steps, scale_of).predicted / times.alpha[-1]


def uni_pc_bh2(x: Tensor, run: Run) -> Sampler:
    return uni_pc(x, run, lambda h: torch.expm1(-h))


class _VpTimes(NamedTuple):
    """Signal share, noise share and log-SNR of the sigmas in the variance-preserving form.

    In fp32 and by way of the logarithm of alpha, as the reference has it: near sigma 0 its rounding shows in the result.
    """

    alpha: Tensor
    std: Tensor
    log_snr: Tensor

    @classmethod
    def of(cls, sigmas: Tensor) -> _VpTimes:
        log_alpha = 0.5 * (1 / (sigmas * sigmas + 1)).log()
        variance = 1.0 - (2.0 * log_alpha).exp()
        return cls(log_alpha.exp(), variance.sqrt(), log_alpha - 0.5 * variance.log())


class _UniPcStep(NamedTuple):
    """One step: its first-order part, the prediction, and what the correction needs."""

    base: Tensor
    predicted: Tensor
    newest: Tensor
    differences: list[Tensor]
    weights: Tensor
    scale: Tensor

    @classmethod
    def plan(
        cls,
        x: Tensor,
        past: list[tuple[int, Tensor]],
        times: _VpTimes,
        i: int,
        scale_of: Callable[[Tensor], Tensor],
    ) -> _UniPcStep:
        """`past`: (index of sigma, evaluation there), newest first; as many as the step's order."""
        order, (at, newest) = len(past), past[0]
        h = times.log_snr[i] - times.log_snr[at]
        ratios = torch.stack([(times.log_snr[j] - times.log_snr[at]) / h for j, _ in past[1:]] + [torch.ones_like(h)])
        differences = [(m - newest) / r for (_, m), r in zip(past[1:], ratios, strict=False)]
        powers = torch.stack([ratios**k for k in range(order)])
        targets, phi, b = [], torch.expm1(-h) / -h - 1, scale_of(h)
        for k in range(1, order + 1):
            targets.append(phi * math.factorial(k) / b)
            phi = phi / -h - 1 / math.factorial(k + 1)
        target = torch.stack(targets)
        # For these low orders the paper takes 1/2 in place of the solution.
        half = torch.full_like(target[:1], 0.5)
        predictor = half if order == 2 else torch.linalg.solve(powers[:-1, :-1], target[:-1])
        corrector = half if order == 1 else torch.linalg.solve(powers, target)
        scale = times.alpha[i] * b
        base = times.std[i] / times.std[at] * x - times.alpha[i] * torch.expm1(-h) * newest
        predicted = base - scale * _weighted(predictor, differences, x)
        return cls(base, predicted, newest, differences, corrector, scale)

    def corrected(self, denoised: Tensor) -> Tensor:
        return self.base - self.scale * _weighted(self.weights, [*self.differences, denoised - self.newest], self.base)


def _weighted(weights: Tensor, tensors: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for weight, tensor in zip(weights[: len(tensors)], tensors, strict=False):
        total = total + weight * tensor
    return total
