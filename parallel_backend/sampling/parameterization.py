"""What a model's output means: the relation of x, sigma and the clean latent.

Sources: rectified flow: Esser et al. 2024 (arXiv 2403.03206), section 2 and equation 23 for the shift. Noise and v
prediction: Karras et al. 2022 (arXiv 2206.00364), table 1; Salimans and Ho 2022 (arXiv 2202.00512), appendix D.
Zero terminal SNR: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


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
    """x = sigma * noise + (1 - sigma) * latent; the model gives noise - latent; timesteps are 1000 * sigma."""

    shift: float = 3.0
    is_flow: bool = True
    steps: int = 1000

    @cached_property
    def sigmas(self) -> Tensor:
        """The 1000 sigmas that the discrete schedules choose from, ascending, fp32."""
        return self.sigma(torch.arange(1, self.steps + 1) / self.steps * self.steps)

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.shifted(timestep / self.steps)

    def shifted(self, t: Tensor) -> Tensor:
        return t if self.shift == 1.0 else self.shift * t / (1 + (self.shift - 1) * t)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.steps

    def sigma_at(self, share: float) -> float:
        return self.shifted(1 - share)

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
class Discrete:
    """x = latent + sigma * noise; the model sees x at unit variance and one of 1000 timesteps; it gives noise, or v.

    v = (noise - sigma * latent) / sqrt(1 + sigma^2). The betas are Stable Diffusion's.
    """

    v_prediction: bool = False
    zero_snr: bool = False
    is_flow: bool = False
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
        t = timestep.float().clamp(0, self.steps - 1)
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high]).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The nearest in log sigma."""
        distances = sigma.log().reshape(-1, 1) - self.log_sigmas
        return distances.abs().argmin(1).view(sigma.shape)

    def sigma_at(self, share: float) -> float:
        return float(self.sigma(torch.tensor((1 - share) * (self.steps - 1))))

    def model_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (sigma**2 + 1).sqrt()

    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        if self.v_prediction:
            return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
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
