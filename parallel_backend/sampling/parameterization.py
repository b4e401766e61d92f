"""What a model's output means: the relation of x, sigma and the clean latent.

Source: rectified flow: Esser et al. 2024 (arXiv 2403.03206), section 2 and equation 23 for the shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Parameterization(Protocol):
    """A noise schedule and the meaning of the model's output under it."""

    @property
    def is_flow(self) -> bool: ...

    @property
    def sigmas(self) -> Tensor: ...
    def sigma(self, timestep: Tensor) -> Tensor: ...
    def timestep(self, sigma: Tensor) -> Tensor: ...
    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor: ...
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

    def denoised(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return x - output * sigma

    def add_noise(self, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return sigma * noise + (1.0 - sigma) * latent

    def finish(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1.0 - sigma)
