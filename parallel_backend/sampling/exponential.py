"""Exponential integrators: what is linear in x is solved exactly, the denoised latent is what gets approximated.

Sources: res_multistep: Zhang et al. 2023 (arXiv 2308.02157), the two-step method. er_sde: Cui et al. 2023 (arXiv 2309.06169),
algorithm 3, with noise function 5. seeds: Gonzalez et al. 2023 (arXiv 2305.14267), data prediction.
exp_heun: the second-order exponential Runge-Kutta method with both ends (Hochbruck and Ostermann 2005, section 5).
Steps are in the half log-SNR lambda.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .samplers import Evaluation, Run, Sampler, ancestral_split, slope


def phi_1(z: Tensor) -> Tensor:
    return torch.expm1(z) / z


def phi_2(z: Tensor) -> Tensor:
    return (phi_1(z) - 1) / z


def res_multistep(x: Tensor, run: Run) -> Sampler:
    return _res_multistep(x, run, ancestral=False)


def res_multistep_ancestral(x: Tensor, run: Run) -> Sampler:
    return _res_multistep(x, run, ancestral=True)


def _res_multistep(x: Tensor, run: Run, *, ancestral: bool) -> Sampler:
    previous: Tensor | None = None
    last_down = run.sigmas[0]
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        down, up = ancestral_split(sigma, following) if ancestral else (following, torch.zeros_like(sigma))
        if previous is None or down == 0:
            x = x + slope(x, sigma, denoised) * (down - sigma)
        else:
            h = sigma.log() - down.log()
            weight = phi_2(-h) * h / (last_down.log() - run.sigmas[i - 1].log())
            x = (-h).exp() * x + h * ((phi_1(-h) - weight) * denoised + weight * previous)
        if ancestral and following > 0:
            x = x + run.noise.gaussian() * up
        previous, last_down = denoised, down
    return x


# -- extended reverse-time SDE --------------------------------------------------------------------------------------

# Points of the sums that stand for the integrals over the noise function.
ER_POINTS = 200


def er_sde(x: Tensor, run: Run) -> Sampler:
    """In units of noise over signal, sigma / alpha; the order rises to 3."""
    run = run.below_infinite_noise()
    ratios = (-run.half_log_snr(run.sigmas)).exp()
    previous: Tensor | None = None
    last_change: Tensor | None = None
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
            continue
        now, then = ratios[i], ratios[i + 1]
        kept, alpha, alpha_now = _er_noise(then) / _er_noise(now), following / then, sigma / now
        x = alpha / alpha_now * kept * x + alpha * (1 - kept) * denoised
        if previous is not None:
            width = (now - then) / ER_POINTS
            points = then + width * torch.arange(ER_POINTS)
            weights = _er_noise(then) * width / _er_noise(points)
            change = (denoised - previous) / (now - ratios[i - 1])
            x = x + alpha * (then - now + weights.sum()) * change
            if last_change is not None:
                second_change = (change - last_change) / ((now - ratios[i - 2]) / 2)
                x = x + alpha * ((then - now) ** 2 / 2 + (weights * (points - now)).sum()) * second_change
            last_change = change
        x = x + alpha * (then**2 - (now * kept) ** 2).clamp(min=0).sqrt() * run.noise.gaussian()
        previous = denoised
    return x


def _er_noise(ratio: Tensor) -> Tensor:
    """How the reverse SDE's own noise grows: the paper's ER-SDE 5."""
    return ratio * ((ratio**0.3).exp() + 10)


# -- stochastic explicit exponential derivative-free solvers --------------------------------------------------------


class _SeedsStep(NamedTuple):
    """A step from x at `sigma` to `following`, whose noise was drawn share by share."""

    run: Run
    x: Tensor
    denoised: Tensor
    sigma: Tensor
    following: Tensor
    eta: float

    @property
    def h(self) -> Tensor:
        return self.run.half_log_snr(self.following) - self.run.half_log_snr(self.sigma)

    def sigma_at(self, share: float) -> Tensor:
        return self.run.sigma_at(
            torch.lerp(self.run.half_log_snr(self.sigma), self.run.half_log_snr(self.following), share)
        )

    def after(self, share: float, correction: Tensor | float, draws: list[tuple[float, Tensor]]) -> Tensor:
        """x after a share of the step.

        Args:
            correction: what is added to phi_1 times the denoised latent.
            draws: (share at which it ends, noise), from the step's start on.
        """
        sigma = self.following if share == 1 else self.sigma_at(share)
        alpha, h = sigma * self.run.half_log_snr(sigma).exp(), share * self.h
        z = -h * (self.eta + 1)
        mean = sigma / self.sigma * (-h * self.eta).exp() * self.x - alpha * z * (phi_1(z) * self.denoised + correction)
        return mean if not draws else mean + sigma * self._noise(share, draws)

    def _noise(self, share: float, draws: list[tuple[float, Tensor]]) -> Tensor:
        """What the draws have come to, each decayed since it was added."""
        total, begin = torch.zeros_like(self.x), 0.0
        for end, noise in draws:
            spread = (-torch.expm1(-2 * (end - begin) * self.h * self.eta)).sqrt()
            total = total + (-(share - end) * self.h * self.eta).exp() * spread * noise
            begin = end
        return total


def seeds_2(x: Tensor, run: Run, eta: float = 1.0, middle: float = 0.5, second_order: bool = False) -> Sampler:
    """
    Args:
        middle: share of a step after which the model is asked again.
        second_order: weigh by phi_2; else by phi_1 alone, as the paper's SEEDS-2.
    """
    run = run.below_infinite_noise()
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
            continue
        step = _SeedsStep(run, x, denoised, sigma, following, eta)
        draws = _draws(run, eta, middle, 1.0)
        ahead = yield Evaluation(step.after(middle, 0.0, draws[:1]), step.sigma_at(middle))
        z = -step.h * (eta + 1)
        weight = phi_2(z) / middle if second_order else phi_1(z) / (2 * middle)
        x = step.after(1, weight * (ahead - denoised), draws)
    return x


def exp_heun_2_x0(x: Tensor, run: Run) -> Sampler:
    return seeds_2(x, run, eta=0.0, middle=1.0, second_order=True)


def exp_heun_2_x0_sde(x: Tensor, run: Run) -> Sampler:
    return seeds_2(x, run, middle=1.0, second_order=True)


def seeds_3(x: Tensor, run: Run, eta: float = 1.0, first: float = 1 / 3, second: float = 2 / 3) -> Sampler:
    run = run.below_infinite_noise()
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
            continue
        step = _SeedsStep(run, x, denoised, sigma, following, eta)
        draws = _draws(run, eta, first, second, 1.0)
        ahead = yield Evaluation(step.after(first, 0.0, draws[:1]), step.sigma_at(first))
        z = -step.h * (eta + 1)
        change = second / first * phi_2(second * z) * (ahead - denoised)
        ahead = yield Evaluation(step.after(second, change, draws[:2]), step.sigma_at(second))
        x = step.after(1, phi_2(z) / second * (ahead - denoised), draws)
    return x


def _draws(run: Run, eta: float, *ends: float) -> list[tuple[float, Tensor]]:
    return [(end, run.noise.gaussian()) for end in ends] if eta > 0 else []
