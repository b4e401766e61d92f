"""Classifier-free guidance on denoised latents, and the mask that keeps a part of the latent.

Sources: Ho and Salimans 2022 (arXiv 2207.12598), equation 6. Its rescaling: Lin et al. 2023 (arXiv 2305.08891), section
3.4. Differential diffusion: Levin and Fried 2023 (arXiv 2306.00950), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .parameterization import Parameterization


def guide(cond: Tensor, uncond: Tensor, cfg_scale: float) -> Tensor:
    return uncond + (cond - uncond) * cfg_scale


def rescaled(guided: Tensor, cond: Tensor, x: Tensor, sigma: Tensor, share: float, *, is_flow: bool) -> Tensor:
    """Guided, brought so far to the spread that cond has by itself: of v, or of the denoised latent of a flow model."""
    if is_flow:
        return guided * _towards_spread(guided, cond, share)
    # Denoised is x / (sigma^2 + 1) less a multiple of v, which scales both spreads alike.
    center = x / (sigma**2 + 1)
    return center + (guided - center) * _towards_spread(guided - center, cond - center, share)


def _towards_spread(tensor: Tensor, like: Tensor, share: float) -> Tensor:
    """What each row of `tensor` is multiplied by."""
    dims = tuple(range(1, tensor.ndim))
    spread = tensor.std(dim=dims, keepdim=True).clamp(min=1e-8)
    return 1 + share * (like.std(dim=dims, keepdim=True) / spread - 1)


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
