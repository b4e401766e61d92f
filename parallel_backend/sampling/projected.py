"""Adaptive projected guidance: guidance along cond, which saturates a picture, counts for less than what is across it.

Source: Sadat et al. 2024 (arXiv 2410.02416), algorithm 1; ComfyUI adds what it comes to on top of guidance of scale 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.guidance import APG

_OF_A_ROW = (-1, -2, -3)


class Projected:
    """Of one job: with momentum, guidance is a running sum over its evaluations, begun anew where sigma rises."""

    def __init__(self, settings: APG) -> None:
        self._settings = settings
        self._sum: Tensor | None = None
        self._sigma: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor, sigma: Tensor, cfg_scale: float) -> Tensor:
        """In cond's place, for classifier-free guidance with that scale, which is not 0. All (B, C, Y, X)."""
        guidance = self._shortened(self._with_former(cond - uncond, sigma))
        along = _projection(guidance, cond)
        return uncond + (guidance - along) + self._settings.eta * along + (cond - uncond) / cfg_scale

    def _with_former(self, guidance: Tensor, sigma: Tensor) -> Tensor:
        if self._sigma is not None and sigma > self._sigma:
            self._sum = None
        self._sigma = sigma
        if self._settings.momentum == 0:
            return guidance
        self._sum = guidance if self._sum is None else self._settings.momentum * self._sum + guidance
        return self._sum

    def _shortened(self, guidance: Tensor) -> Tensor:
        longest = self._settings.norm_threshold
        if longest == 0:
            return guidance
        length = guidance.norm(p=2, dim=_OF_A_ROW, keepdim=True)
        return guidance * torch.clamp(longest / length, max=1.0)


def _projection(tensor: Tensor, onto: Tensor) -> Tensor:
    """What of each row of `tensor` is along that of `onto`."""
    direction = F.normalize(onto, dim=_OF_A_ROW)  # type: ignore[arg-type] # any dims that norm takes
    return (tensor * direction).sum(dim=_OF_A_ROW, keepdim=True) * direction
