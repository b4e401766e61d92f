"""Perp-Neg: a negative prompt takes away only what the positive one doesn't ask for.

Source: Armandpour et al. 2023 (arXiv 2304.04968), equation 5, for one negative prompt.
"""

from __future__ import annotations

from torch import Tensor


def perp_neg(cond: Tensor, uncond: Tensor | None, empty: Tensor, neg_scale: float, cfg_scale: float) -> Tensor:
    """The denoised latent, of those of the positive, the negative and the empty prompt.

    Args:
        uncond: None where `neg_scale` is 0. The projection is one for the whole batch, as in ComfyUI.
    """
    positive = cond - empty
    if uncond is None:
        return empty + cfg_scale * positive
    negative = uncond - empty
    across = negative - (negative * positive).sum() / positive.norm() ** 2 * positive
    return empty + cfg_scale * (positive - across * neg_scale)
