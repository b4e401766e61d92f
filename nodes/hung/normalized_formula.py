"""The formula of normalized attention guidance, as packs' own code is compared with it before the ranks are told its numbers."""

from __future__ import annotations

from torch import Tensor

NAME = "Normalized attention guidance"


def guided_away(positive: Tensor, negative: Tensor, scale: float, alpha: float, tau: float) -> Tensor:
    """What takes the place of `positive`. Source: Chen et al. 2025 (arXiv 2505.21179), equations 6 to 9."""
    guided = scale * positive + (1 - scale) * negative
    growth = guided.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    return alpha * guided * (growth.clamp(max=tau) / growth) + (1 - alpha) * positive
