"""What a model's output means: the relation of x, sigma and the clean latent.

Sources: rectified flow: Esser et al. 2024 (arXiv 2403.03206), section 2 and equation 23 for the shift. Noise and v
prediction, EDM: Karras et al. 2022 (arXiv 2206.00364), table 1; Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
Zero terminal SNR: Lin et al. 2023 (arXiv 2305.08891), algorithm 1. LCM: Luo et al. 2023 (arXiv 2310.04378), section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..config import ContinuousSampling, DiscreteSampling, FlowSampling, ModelSampling


class Parameterization(Protocol):
    """A noise schedule and the meaning of the model's output under it. Sigmas and timesteps are on the CPU."""

    @property
    def is_flow(self) -> bool: ...

    @property
    def sigmas(self) -> Tensor: ...
    def sigma(self, timestep: Tensor) -> Tensor: ...
    def timestep(self, sigma: Tensor) -> Tensor: ...
    def sigma_at(self, share: float) -> float:
        """The sigma after so much of the model's time, 0 at the start of sampling and 1 at the end."""
        ...

    def model_input(self, x: Tensor, sigma: Tensor) -> Tensor: ...
    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor: ...
    def start(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...
    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...
    def finish(self, x: Tensor, sigma: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Flow:
    """x = sigma * noise + (1 - sigma) * latent; the model gives noise - latent; timesteps are sigma times a multiplier."""

    shift: float = 3.0
    multiplier: float = 1000.0
    steps: int = 1000
    is_flow: bool = True

    @cached_property
    def sigmas(self) -> Tensor:
        """Those that the discrete schedules choose from, ascending, fp32."""
        return self.sigma(torch.arange(1, self.steps + 1) / self.steps * self.multiplier)

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.shifted(timestep / self.multiplier)

    def shifted(self, t: Tensor) -> Tensor:
        return t if self.shift == 1.0 else self.shift * t / (1 + (self.shift - 1) * t)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def sigma_at(self, share: float) -> float:
        return float(self.shifted(torch.tensor(1 - share, dtype=torch.float64)))

    def model_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x

    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return x - output * sigma

    def start(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self.add_noise(latent, noise, sigma)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return sigma * noise + (1.0 - sigma) * latent

    def finish(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1.0 - sigma)


@dataclass(frozen=True)
class _Exploding:
    """x = latent + sigma * noise; the model sees x at the variance of its data, sigma_data^2.

    v = (sigma_data^2 * noise - sigma * latent) / (sigma_data * sqrt(sigma^2 + sigma_data^2)); EDM's output is -v.
    """

    prediction: str = "eps"
    sigma_data: float = 1.0
    is_flow: bool = False

    @property
    def sigmas(self) -> Tensor:
        raise NotImplementedError

    def model_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x if self.prediction == "img_to_img" else x / (sigma**2 + self.sigma_data**2).sqrt()

    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        if self.prediction in ("x0", "img_to_img"):
            return output
        if self.prediction in ("v_prediction", "edm"):
            variance = sigma**2 + self.sigma_data**2
            v = output if self.prediction == "v_prediction" else -output
            return x * self.sigma_data**2 / variance - v * sigma * self.sigma_data / variance.sqrt()
        return x - output * sigma

    def start(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """At the largest sigma the whole variance is that of the training's last step, the signal's share included."""
        if sigma > self.sigmas[-1] * (1 - 1e-5):
            return latent + noise * (1 + sigma**2).sqrt()
        return self.add_noise(latent, noise, sigma)

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return latent + noise * sigma

    def finish(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Discrete(_Exploding):
    """The model is told one of 1000 timesteps, of Stable Diffusion's betas."""

    zero_snr: bool = False
    steps: int = 1000
    first_beta: float = 0.00085
    last_beta: float = 0.012

    @cached_property
    def sigmas(self) -> Tensor:
        """Of each timestep, ascending, fp32."""
        return self._exact_sigmas.float()

    @cached_property
    def log_sigmas(self) -> Tensor:
        """fp32, of the exact sigmas: half-way between two timesteps the last bit decides which one is nearest."""
        return self._exact_sigmas.log().float()

    @cached_property
    def _exact_sigmas(self) -> Tensor:
        roots = torch.linspace(self.first_beta**0.5, self.last_beta**0.5, self.steps, dtype=torch.float64)
        signal = torch.cumprod(1 - roots**2, 0)
        if self.zero_snr:
            root = signal.sqrt()
            signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
            # A signal of 0 would be an infinite sigma; this one is as near as ComfyUI goes.
            signal[-1] = 4.8973451890853435e-08
        return ((1 - signal) / signal).sqrt()

    def sigma(self, timestep: Tensor) -> Tensor:
        """Between timesteps, log sigma is linear."""
        t = timestep.float().clamp(0, len(self.log_sigmas) - 1)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The nearest in log sigma."""
        distances = sigma.log().reshape(-1, 1) - self.log_sigmas
        return distances.abs().argmin(1).view(sigma.shape)

    def sigma_at(self, share: float) -> float:
        return float(self.sigma(torch.tensor((1 - share) * (self.steps - 1))))


@dataclass(frozen=True)
class Distilled(Discrete):
    """A latent consistency model, which knows every 20th timestep and leaves x as it is where there is no noise left."""

    every: int = 20
    data_std: float = 0.5
    times_scale: float = 10.0

    @cached_property
    def sigmas(self) -> Tensor:
        return super().sigmas[self.every - 1 :: self.every]

    @cached_property
    def log_sigmas(self) -> Tensor:
        return self.sigmas.log()

    def sigma(self, timestep: Tensor) -> Tensor:
        return super().sigma((timestep.float() - (self.every - 1)) / self.every)

    def timestep(self, sigma: Tensor) -> Tensor:
        return super().timestep(sigma) * self.every + self.every - 1

    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        t = self.timestep(sigma) * self.times_scale
        variance = t**2 + self.data_std**2
        return (x - output * sigma) * (t / variance.sqrt()) + x * (self.data_std**2 / variance)


@dataclass(frozen=True)
class Continuous(_Exploding):
    """Any sigma; the model is told a quarter of its logarithm, or its arc tangent as a share of the right angle."""

    arctan: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 120.0
    steps: int = 1000

    @cached_property
    def sigmas(self) -> Tensor:
        """Those that the discrete schedules choose from, ascending, fp32."""
        return torch.linspace(math.log(self.sigma_min), math.log(self.sigma_max), self.steps).exp()

    def sigma(self, timestep: Tensor) -> Tensor:
        return (timestep * (math.pi / 2)).tan() if self.arctan else (timestep * 4).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma.atan() / (math.pi / 2) if self.arctan else sigma.log() / 4

    def sigma_at(self, share: float) -> float:
        low, high = math.log(self.sigmas[0]), math.log(self.sigmas[-1])
        return math.exp(high + (low - high) * share)


def parameterization_of(sampling: ModelSampling) -> Parameterization:
    match sampling:
        case FlowSampling():
            return Flow(sampling.shift, sampling.multiplier, sampling.sigmas)
        case DiscreteSampling(prediction="lcm"):
            return Distilled(zero_snr=sampling.zero_snr)
        case DiscreteSampling():
            return Discrete(sampling.prediction, zero_snr=sampling.zero_snr)
        case ContinuousSampling():
            return Continuous(
                sampling.prediction,
                sampling.sigma_data,
                arctan=sampling.times == "arctan",
                sigma_min=sampling.sigma_min,
                sigma_max=sampling.sigma_max,
            )
