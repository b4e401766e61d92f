"""Classifier-free guidance on denoised latents, and the mask that keeps a part of the latent.

Source: Ho and Salimans 2022 (arXiv 2207.12598), equation 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .parameterization import Parameterization


def guide(cond: Tensor, uncond: Tensor, cfg_scale: float) -> Tensor:
    return uncond + (cond - uncond) * cfg_scale


@dataclass(frozen=True)
class Inpaint:
    """Where the mask is 0 the latent stays as it was: before the model noised to sigma, after it clean."""

    mask: Tensor
    latent: Tensor
    noise: Tensor
    parameterization: Parameterization

    def before(self, x: Tensor, sigma: Tensor) -> Tensor:
        kept = self.parameterization.add_noise(self.latent, self.noise, sigma)
        return x * self.mask + kept * (1.0 - self.mask)

    def after(self, denoised: Tensor) -> Tensor:
        return denoised * self.mask + self.latent * (1.0 - self.mask)


def mask_for(mask: Tensor, latent: Tensor) -> Tensor:
    """The mask at the latent's size: bilinear, repeated over batch and channels.

    Args:
        mask: (Y, X), (B, Y, X) or (B, 1, Y, X), any Y and X.
    """
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    mask = F.interpolate(mask, size=latent.shape[-2:], mode="bilinear").to(latent.device)
    repeats = -(-latent.shape[0] // mask.shape[0])
    return mask.repeat(repeats, latent.shape[1], 1, 1)[: latent.shape[0]]
