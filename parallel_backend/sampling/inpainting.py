"""The mask that keeps a part of the latent.

Source: differential diffusion, Levin and Fried 2023 (arXiv 2306.00950), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .parameterization import Parameterization


@dataclass(frozen=True)
class Gradual:
    """Of a mask's values, those begin to change first that are nearest to 1; below 1, strength mixes in the mask itself."""

    sigmas: Tensor
    strength: float
    parameterization: Parameterization

    def at(self, mask: Tensor, sigma: Tensor) -> Tensor:
        model = self.parameterization
        last = torch.maximum(self.sigmas[-1], model.sigmas[0])
        now, begin, end = (model.timestep(s).float() for s in (sigma, self.sigmas[0], last))
        begun = (mask >= float((now - end) / (begin - end))).to(mask.dtype)
        return torch.lerp(mask, begun, self.strength) if 0 < self.strength < 1 else begun


@dataclass(frozen=True)
class Inpaint:
    """Where the mask is 0 the latent stays as it was: before the model noised to sigma, after it clean."""

    mask: Tensor
    latent: Tensor
    noise: Tensor
    parameterization: Parameterization
    gradual: Gradual | None = None

    def of(self, rows: slice) -> Inpaint:
        """For a sampler of these rows of latent."""
        mask, latent, noise = (x[:, :, rows] for x in (self.mask, self.latent, self.noise))
        return replace(self, mask=mask, latent=latent, noise=noise)

    def before(self, x: Tensor, sigma: Tensor) -> Tensor:
        kept, mask = self.parameterization.add_noise(self.latent, self.noise, sigma), self._mask(sigma)
        return x * mask + kept * (1.0 - mask)

    def after(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        mask = self._mask(sigma)
        return denoised * mask + self.latent * (1.0 - mask)

    def _mask(self, sigma: Tensor) -> Tensor:
        return self.mask if self.gradual is None else self.gradual.at(self.mask, sigma)


def mask_for(mask: Tensor, latent: Tensor) -> Tensor:
    """The mask at the latent's size: bilinear, repeated over batch and channels.

    Args:
        mask: (Y, X), (B, Y, X) or (B, 1, Y, X), any Y and X.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    mask = F.interpolate(mask, size=latent.shape[-2:], mode="bilinear").to(latent.device)
    repeats = -(-latent.shape[0] // mask.shape[0])
    return mask.repeat(repeats, latent.shape[1], 1, 1)[: latent.shape[0]]
