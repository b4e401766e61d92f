"""SA-Solver: Adams methods for a reverse SDE whose noise is on in the middle of the run.

Source: Xue et al. 2023 (arXiv 2309.05019), algorithm 1, equations 15 and 18. tau is 1 between 20 % and 80 % of the model's
time and else 0; predictors are of order 3, correctors of order 4, both lower at the ends.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .samplers import Evaluation, Run, Sampler

PREDICTOR_ORDER, CORRECTOR_ORDER = 3, 4
NOISE_FROM, NOISE_TO = 0.2, 0.8


def sa_solver(x: Tensor, run: Run) -> Sampler:
    return _sa_solver(x, run, evaluate_again=False)


def sa_solver_pece(x: Tensor, run: Run) -> Sampler:
    """With an evaluation more, after each correction."""
    return _sa_solver(x, run, evaluate_again=True)


class _Adams(NamedTuple):
    """A step from one sigma to another, in half log-SNR."""

    start: float
    end: float
    sigma: Tensor
    kept: Tensor
    tau: float

    @classmethod
    def between(cls, run: Run, lambdas: list[float], i: int, tau: float) -> _Adams:
        """The step from sigma number i - 1 to number i."""
        start, end, sigma = lambdas[i - 1], lambdas[i], run.sigmas[i]
        return cls(start, end, sigma, sigma / run.sigmas[i - 1] * math.exp(-(tau**2) * (end - start)), tau)

    def mean(self, x: Tensor, past: list[tuple[float, Tensor]]) -> Tensor:
        """x at the end, without noise, by the polynomial through past (lambda, denoised latent)."""
        nodes = torch.tensor([at for at, _ in past], dtype=torch.float64) - self.end
        powers = torch.stack([nodes**p for p in range(len(past))])
        weights = torch.linalg.solve(powers, self._integrals(len(past)))
        scale = float(self.sigma) * math.exp(self.end)
        out = self.kept * x
        for weight, (_, denoised) in zip(weights, past, strict=True):
            out = out + float(weight) * scale * denoised
        return out

    def _integrals(self, order: int) -> Tensor:
        """Of c exp(c u) u^p over the step, u = lambda - end, c = 1 + tau^2; by parts from one power to the next."""
        c, h = 1 + self.tau**2, self.end - self.start
        values = [-math.expm1(-c * h)]
        for p in range(1, order):
            values.append(-math.exp(-c * h) * (-h) ** p - p / c * values[-1])
        return torch.tensor(values, dtype=torch.float64)

    def noise(self, run: Run) -> Tensor | None:
        if self.tau == 0:
            return None
        return run.noise.gaussian() * self.sigma * math.sqrt(-math.expm1(-2 * self.tau**2 * (self.end - self.start)))


def _sa_solver(x: Tensor, run: Run, *, evaluate_again: bool) -> Sampler:
    noise_from, noise_to = (run.model.sigma_at(share) for share in (NOISE_FROM, NOISE_TO))
    run = run.below_infinite_noise()
    lambdas = run.half_log_snr(run.sigmas.double()).tolist()
    steps, to_zero = len(run.sigmas) - 1, bool(run.sigmas[-1] == 0)
    past: list[tuple[float, Tensor]] = []
    step, noise, predicted = None, None, x
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(predicted, sigma, i)
        past = [(lambdas[i], denoised), *past[: CORRECTOR_ORDER - 1]]
        left = steps - i if to_zero else CORRECTOR_ORDER + 1
        order = min(CORRECTOR_ORDER, left)
        if step is None or (following == 0 and not evaluate_again):
            x = predicted
        else:
            x = step.mean(x, past[:order])
            x = x if noise is None else x + noise
            if evaluate_again:
                denoised = yield Evaluation(x, sigma)
                past[0] = (lambdas[i], denoised)
        if following == 0:
            predicted = denoised
        else:
            tau = 1.0 if noise_to <= following <= noise_from else 0.0
            step = _Adams.between(run, lambdas, i + 1, tau)
            noise = step.noise(run)
            predicted = step.mean(x, past[: min(PREDICTOR_ORDER, left - 1)])
            predicted = predicted if noise is None else predicted + noise
    return predicted
