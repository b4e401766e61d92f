"""Guidance on denoised latents.

Sources: classifier-free guidance, Ho and Salimans 2022 (arXiv 2207.12598), equation 6. Its rescaling: Lin et al. 2023 (arXiv
2305.08891), section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..config import BranchName, SamplerSpec
from .parameterization import Parameterization
from .perp_neg import perp_neg
from .projected import Projected


@dataclass(frozen=True)
class Branches:
    """The denoised latent (B, C, Y, X) of each evaluation that guidance has made; None of those that it hasn't."""

    cond: Tensor
    uncond: Tensor | None = None
    empty: Tensor | None = None
    weaker: Tensor | None = None


class Guidance:
    """Of one job: what comes of a model's outputs.

    Args:
        names: of the outputs, in their order; those at the end may be missing.
    """

    def __init__(
        self, spec: SamplerSpec, model: Parameterization, names: Sequence[BranchName] = ("cond", "uncond")
    ) -> None:
        self._spec, self._model, self._names = spec, model, names
        self._projected = None if spec.apg is None else Projected(spec.apg)

    def __call__(self, x: Tensor, sigma: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The denoised latent at x."""
        denoised = (self._model.denoised(x, sigma, out) for out in outputs)
        found = Branches(**dict(zip(self._names, denoised, strict=False)))
        cond = found.cond
        if self._projected is not None and found.uncond is not None:
            cond = self._projected(cond, found.uncond, sigma, self._spec.cfg_scale)
        guided = self._guided(cond, found, x, sigma)
        return guided if found.weaker is None else self._away_from(found.weaker, guided, cond)

    def _guided(self, cond: Tensor, found: Branches, x: Tensor, sigma: Tensor) -> Tensor:
        spec = self._spec
        if found.empty is not None:
            return perp_neg(cond, found.uncond, found.empty, spec.neg_scale or 0.0, spec.cfg_scale)
        if found.uncond is None:
            return cond
        guided = guide(cond, found.uncond, spec.cfg_scale)
        if spec.rescale_cfg == 0:
            return guided
        return rescaled(guided, cond, x, sigma, spec.rescale_cfg, is_flow=self._model.is_flow)

    def _away_from(self, weaker: Tensor, guided: Tensor, cond: Tensor) -> Tensor:
        asked = self._spec.weaker
        assert asked is not None
        guided = guided + (cond - weaker) * asked.scale
        if asked.rescale == 0:
            return guided
        return guided * (1 + asked.rescale * (cond.std() / guided.std() - 1))


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
