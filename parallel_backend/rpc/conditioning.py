"""A prompt, as clients hand it over and messages name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .messages import Prompt


@dataclass(frozen=True)
class Conditioning:
    """A prompt as SD3 or SDXL takes it.

    Args:
        context: (B, L, E) text tokens.
        pooled: (B, A).
        sizes: SDXL's height, width, crop_y, crop_x, target height and target width in pixels (the refiner's: an
            aesthetic score in place of the last two); None where `pooled` holds them embedded already.
    """

    context: Tensor
    pooled: Tensor
    sizes: Sequence[float] | None = None

    def prompt(self, context: int, pooled: int) -> Prompt:
        """As a message names it, given the places of the two tensors there."""
        return Prompt(context, pooled, None if self.sizes is None else [float(size) for size in self.sizes])
