"""The formula of normalized attention guidance, as packs' own code is compared with it before the ranks are told its numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from .pack_version import pack_and_version
from .refusal import LOCALLY

NAME = "Normalized attention guidance"
_TOLERANCE = 1e-4


def guided_away(positive: Tensor, negative: Tensor, scale: float, alpha: float, tau: float) -> Tensor:
    """What takes the place of `positive`. Source: Chen et al. 2025 (arXiv 2505.21179), equations 6 to 9."""
    guided = scale * positive + (1 - scale) * negative
    growth = guided.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    return alpha * guided * (growth.clamp(max=tau) / growth) + (1 - alpha) * positive


def drawn(*shape: int) -> Tensor:
    """The same random numbers each time, another set for each shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def is_alike(theirs: Tensor, ours: Tensor) -> bool:
    """Whether both are of one shape and one value."""
    return theirs.shape == ours.shape and torch.allclose(theirs.cpu(), ours, rtol=_TOLERANCE, atol=_TOLERANCE)


def unknown(of_pack: Any, why: str) -> UnsupportedError:
    """What to raise for a function or class of a pack that does something else."""
    return UnsupportedError(
        f"{NAME} ({pack_and_version(of_pack)}) is of a version that is not known: {why}.",
        f"Use another version of that pack, or {LOCALLY}.",
    )
