"""A prompt, as clients hand it over and messages name it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        concat: (B, C, Y, X) of the latent's Y and X: what an inpainting model takes beside the latent (mask and masked latent, 5
            channels) or an edit model (the picture's latent, 4), as the model takes it; None for all others.
    """

    context: Tensor
    pooled: Tensor
    sizes: Sequence[float] | None = None
    concat: Tensor | None = None

    def prompt(self, attach: Callable[[Tensor], int]) -> Prompt:
        """As a message names it; `attach` puts a tensor there, and says its place."""
        places = attach(self.context), attach(self.pooled)
        sizes = None if self.sizes is None else [float(size) for size in self.sizes]
        return Prompt(*places, sizes, None if self.concat is None else attach(self.concat))
