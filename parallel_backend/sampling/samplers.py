"""Samplers as generators: each yields where it wants the model evaluated and is sent the denoised latent.

A sampler knows its sigmas and nothing of models, ranks or patches. What it returns is the end of the run.
Names and defaults are those of k-diffusion and ComfyUI: eta 1, s_noise 1, no churn.

Sources: euler, heun, dpm_2: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 and 2. DPM-Solver++: Lu et al. 2022
(arXiv 2211.01095). The SDE kinds: Lu et al. 2022, section 5, in terms of the half log-SNR.
Ancestral steps on flow models renoise so that the signal's share is kept: see `FlowAncestral`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .noise import Noise
from .parameterization import Flow, Parameterization


class Evaluation(NamedTuple):
    """The model is wanted at (x, sigma). `step` is set at the first evaluation of each step, for progress."""

    x: Tensor
    sigma: Tensor
    step: int | None = None


Sampler = Generator[Evaluation, Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """What a sampler is given beside x: its sigmas (on the CPU), its noise and the meaning of sigma.

    `agreed`: a number of the latent's device as every rank is to see it; reading one waits for the device.
    """

    sigmas: Tensor
    noise: Noise
    model: Parameterization
    agreed: Callable[[Tensor], float] = float

    @property
    def pairs(self) -> list[tuple[int, Tensor, Tensor]]:
        """(step, sigma now, sigma next)."""
        return [(i, self.sigmas[i], self.sigmas[i + 1]) for i in range(len(self.sigmas) - 1)]

    @property
    def noisy_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(sigma now, sigma next) of the steps after which there is noise left."""
        return [(sigma, following) for _, sigma, following in self.pairs if following > 0]

    def half_log_snr(self, sigma: Tensor) -> Tensor:
        return -sigma.logit() if self.model.is_flow else -sigma.log()

    def sigma_at(self, half_log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-half_log_snr) if self.model.is_flow else torch.exp(-half_log_snr)

    def half_way(self, sigma: Tensor, following: Tensor) -> Tensor:
        """The sigma in the middle of a step, by log-SNR."""
        return self.sigma_at((self.half_log_snr(sigma) + self.half_log_snr(following)) / 2)

    def below_infinite_noise(self) -> Run:
        """The same run with a first sigma whose log-SNR is finite: on a flow model sigma 1 is pure noise."""
        if isinstance(self.model, Flow) and self.sigmas[0] >= 1:
            first = self.model.shifted(torch.tensor(1.0 - 1e-4, dtype=torch.float64)).to(self.sigmas)
            return replace(self, sigmas=torch.cat([first.view(1), self.sigmas[1:]]))
        return self


def slope(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma of the probability-flow ODE."""
    return (x - denoised) / sigma


def ancestral_split(sigma: Tensor, following: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(sigma to step down to, noise to add back) for one ancestral step of a variance-exploding model."""
    up = torch.minimum(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2).sqrt())
    return (following**2 - up**2).sqrt(), up


class FlowAncestral(NamedTuple):
    """One ancestral step of a flow model: go down below the next sigma, then scale and renoise up to it.

    down = next^2 / sigma. At `down` the signal has share 1 - down; `scale` brings it to 1 - next, and `up` is the
    noise that is then missing for a total of next^2.
    """

    down: Tensor
    scale: Tensor
    up: Tensor

    @classmethod
    def between(cls, sigma: Tensor, following: Tensor) -> FlowAncestral:
        down = following * (following / sigma)
        scale = (1 - following) / (1 - down)
        return cls(down, scale, (following**2 - down**2 * scale**2).sqrt())


def euler(x: Tensor, run: Run) -> Sampler:
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        x = x + slope(x, sigma, denoised) * (following - sigma)
    return x


def euler_ancestral(x: Tensor, run: Run) -> Sampler:
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
        elif run.model.is_flow:
            step = FlowAncestral.between(sigma, following)
            x = torch.lerp(denoised, x, float(step.down / sigma))
            x = step.scale * x + run.noise.gaussian() * step.up
        else:
            down, up = ancestral_split(sigma, following)
            x = x + slope(x, sigma, denoised) * (down - sigma) + run.noise.gaussian() * up
    return x


def euler_stochastic(x: Tensor, run: Run) -> Sampler:
    """Euler with some noise after each step, the last too; for flow models, where sigma is the time.

    Source: the sampler of that name in gmongaras/Stable-Diffusion-3-From-Scratch.
    Raises: InputError: not a flow model.
    """
    if not run.model.is_flow:
        raise InputError("euler_stochastic samples flow models only.", "Use euler_ancestral.")
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        spread = sigma * (1 - sigma) / (1 - sigma + 0.008)
        step = sigma - following
        x = x - slope(x, sigma, denoised) * step + spread * run.noise.gaussian() * step.sqrt()
    return x


def heun(x: Tensor, run: Run) -> Sampler:
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        d = slope(x, sigma, denoised)
        ahead = x + d * (following - sigma)
        if following != 0:
            denoised = yield Evaluation(ahead, following)
            ahead = x + (d + slope(ahead, following, denoised)) / 2 * (following - sigma)
        x = ahead
    return x


def heunpp2(x: Tensor, run: Run) -> Sampler:
    """Heun's step with a look at up to three sigmas, whose slopes weigh as their sigmas do.

    Source: Heun++ of Carzit/sd-webui-samplers-scheduler; there is no paper.
    """
    steps, largest = len(run.sigmas) - 1, run.sigmas[0]
    for i, sigma, following in run.pairs:
        count = min(3, steps - i)
        slopes: list[Tensor] = []
        ahead = x
        for j in range(i, i + count):
            denoised = yield Evaluation(ahead, run.sigmas[j], i if j == i else None)
            slopes.append(slope(ahead, run.sigmas[j], denoised))
            ahead = ahead + slopes[-1] * (run.sigmas[j + 1] - run.sigmas[j])
        weights = run.sigmas[i + 1 : i + count] / (count * largest)
        mean = (1 - weights.sum()) * slopes[0]
        for weight, d in zip(weights, slopes[1:], strict=True):
            mean = mean + weight * d
        x = x + mean * (following - sigma)
    return x


def _midpoint(x: Tensor, sigma: Tensor, target: Tensor, denoised: Tensor) -> Sampler:
    """The rest of a DPM-Solver-2 step to `target`, through the geometric mean of the two sigmas."""
    middle = torch.lerp(sigma.log(), target.log(), 0.5).exp()
    x_middle = x + slope(x, sigma, denoised) * (middle - sigma)
    denoised = yield Evaluation(x_middle, middle)
    return x + slope(x_middle, middle, denoised) * (target - sigma)


def dpm_2(x: Tensor, run: Run) -> Sampler:
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = x + slope(x, sigma, denoised) * (following - sigma)
        else:
            x = yield from _midpoint(x, sigma, following, denoised)
    return x


def dpm_2_ancestral(x: Tensor, run: Run) -> Sampler:
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = x + slope(x, sigma, denoised) * (following - sigma)
        elif run.model.is_flow:
            step = FlowAncestral.between(sigma, following)
            x = yield from _midpoint(x, sigma, step.down, denoised)
            x = step.scale * x + run.noise.gaussian() * step.up
        else:
            down, up = ancestral_split(sigma, following)
            x = yield from _midpoint(x, sigma, down, denoised)
            x = x + run.noise.gaussian() * up
    return x


def dpmpp_2s_ancestral(x: Tensor, run: Run) -> Sampler:
    step_of = _dpmpp_2s_flow if run.model.is_flow else _dpmpp_2s_exploding
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = x + slope(x, sigma, denoised) * (following - sigma)
        else:
            x = yield from step_of(x, sigma, following, denoised, run)
    return x


def _dpmpp_2s_flow(x: Tensor, sigma: Tensor, following: Tensor, denoised: Tensor, run: Run) -> Sampler:
    step = FlowAncestral.between(sigma, following)
    if sigma == 1.0:  # the log-SNR there is infinite
        middle = torch.full_like(sigma, 0.9999)
    else:
        middle = run.half_way(sigma, step.down)
    denoised = yield Evaluation(torch.lerp(denoised, x, float(middle / sigma)), middle)
    x = torch.lerp(denoised, x, float(step.down / sigma))
    return step.scale * x + run.noise.gaussian() * step.up


def _dpmpp_2s_exploding(x: Tensor, sigma: Tensor, following: Tensor, denoised: Tensor, run: Run) -> Sampler:
    down, up = ancestral_split(sigma, following)
    middle = (sigma * down).sqrt()
    denoised = yield Evaluation(torch.lerp(denoised, x, float(middle / sigma)), middle)
    return torch.lerp(denoised, x, float(down / sigma)) + run.noise.gaussian() * up


def dpmpp_sde(x: Tensor, run: Run) -> Sampler:
    run = run.below_infinite_noise()
    run.noise.foresee([(sigma, end) for sigma, then in run.noisy_pairs for end in (run.half_way(sigma, then), then)])
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
            continue
        middle = run.half_way(sigma, following)
        x_middle = _sde_substep(x, sigma, middle, denoised, run)
        denoised = yield Evaluation(x_middle, middle)
        x = _sde_substep(x, sigma, following, denoised, run)
    return x


def _sde_substep(x: Tensor, sigma: Tensor, target: Tensor, denoised: Tensor, run: Run) -> Tensor:
    """One exponential-integrator step to `target` with ancestral noise, in units of noise over signal."""
    now, then = run.half_log_snr(sigma), run.half_log_snr(target)
    alpha_now, alpha_then = sigma * now.exp(), target * then.exp()
    down, up = ancestral_split((-now).exp(), (-then).exp())
    h = -down.log() - now
    x = (alpha_then / alpha_now) * (-h).exp() * x - alpha_then * (-h).expm1() * denoised
    return x + alpha_then * run.noise.brownian(sigma, target) * up


def dpmpp_2m(x: Tensor, run: Run) -> Sampler:
    previous = last_h = None
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        h = sigma.log() - following.log()
        guess = denoised
        if previous is not None and last_h is not None and following > 0:
            guess = denoised + (denoised - previous) * h / (2 * last_h)
        x = (following / sigma) * x - (-h).expm1() * guess
        previous, last_h = denoised, h
    return x


def dpmpp_2m_sde(x: Tensor, run: Run, second_order: Callable[[Tensor], Tensor] | None = None) -> Sampler:
    """`second_order`: the weight of the denoised latent's change, of the step in log-SNR; None is the midpoint rule's."""
    weight = second_order or (lambda h: -0.5 * torch.expm1(-2 * h))
    run = run.below_infinite_noise()
    run.noise.foresee(run.noisy_pairs)
    previous = last_h = None
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
            continue
        h, alpha, start = _sde_multistep(x, sigma, following, denoised, run)
        x = start
        if previous is not None and last_h is not None:
            x = x + alpha * weight(h) * (h / last_h) * (denoised - previous)
        x = x + _sde_noise(sigma, following, h, run)
        previous, last_h = denoised, h
    return x


def dpmpp_2m_sde_heun(x: Tensor, run: Run) -> Sampler:
    return dpmpp_2m_sde(x, run, lambda h: torch.expm1(-2 * h) / (2 * h) + 1)


def dpmpp_3m_sde(x: Tensor, run: Run) -> Sampler:
    run = run.below_infinite_noise()
    run.noise.foresee(run.noisy_pairs)
    past: list[Tensor] = []
    past_h: list[Tensor] = []
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        if following == 0:
            x = denoised
            continue
        h, alpha, x = _sde_multistep(x, sigma, following, denoised, run)
        phi_2 = (-2 * h).expm1() / (2 * h) + 1
        if len(past) == 2:
            r0, r1 = past_h[0] / h, past_h[1] / h
            first, second = (denoised - past[0]) / r0, (past[0] - past[1]) / r1
            d1, d2 = first + (first - second) * r0 / (r0 + r1), (first - second) / (r0 + r1)
            x = x + alpha * phi_2 * d1 - alpha * (phi_2 / (2 * h) - 0.5) * d2
        elif past:
            x = x + alpha * phi_2 * (denoised - past[0]) * h / past_h[0]
        x = x + _sde_noise(sigma, following, h, run)
        past, past_h = [denoised, *past[:1]], [h, *past_h[:1]]
    return x


def _sde_multistep(
    x: Tensor, sigma: Tensor, following: Tensor, denoised: Tensor, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, signal share at the end, x after the first-order part) of a multistep SDE step."""
    now, then = run.half_log_snr(sigma), run.half_log_snr(following)
    h, alpha = then - now, following * then.exp()
    return h, alpha, (following / sigma) * (-h).exp() * x - alpha * (-2 * h).expm1() * denoised


def _sde_noise(sigma: Tensor, following: Tensor, h: Tensor, run: Run) -> Tensor:
    return run.noise.brownian(sigma, following) * following * (-(-2 * h).expm1()).sqrt()


def lcm(x: Tensor, run: Run) -> Sampler:
    """Source: Luo et al. 2023 (arXiv 2310.04378), algorithm 3."""
    for i, sigma, following in run.pairs:
        x = yield Evaluation(x, sigma, i)
        if following > 0:
            x = run.model.add_noise(x, run.noise.gaussian(), following)
    return x


def ddpm(x: Tensor, run: Run) -> Sampler:
    """Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 2, with x scaled to unit variance between steps."""
    for i, sigma, following in run.pairs:
        denoised = yield Evaluation(x, sigma, i)
        kept, kept_next = 1 / (sigma**2 + 1), 1 / (following**2 + 1)
        alpha = kept / kept_next
        noise = slope(x, sigma, denoised)
        x = (x * kept.sqrt() - (1 - alpha) * noise / (1 - kept).sqrt()) / alpha.sqrt()
        if following > 0:
            x = x + ((1 - alpha) * (1 - kept_next) / (1 - kept)).sqrt() * run.noise.gaussian()
            x = x / kept_next.sqrt()
    return x
