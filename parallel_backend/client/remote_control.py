"""A ControlNet that the ranks hold and compute, and its use on a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rpc import messages
from .held import Held


class RemoteControl(Held[messages.LoadControl]):
    """A ControlNet in a backend, beside the model that it is for."""


@dataclass(frozen=True)
class ControlUse:
    """A ControlNet on a prompt.

    Args:
        hint: (B, 3, 8 * Y, 8 * X) pixels in 0..1 for SDXL; a latent (B, C, Y, X) in the ControlNet's own scale for SD3. One row
            serves for all.
        start, end: sigmas; it is added from `start`, the greater one, to `end`. None is from the first, or to the last.
        types: of a union's, what the hint is.
    """

    net: RemoteControl
    hint: Tensor
    strength: float = 1.0
    start: float | None = None
    end: float | None = None
    types: tuple[int, ...] = ()

    def named(self, attach: Callable[[Tensor], int]) -> messages.ControlUse:
        """As a request names it; `attach` takes the hint along, and tells its place."""
        hint = attach(self.hint)
        start, end = (None if sigma is None else _as_float32(sigma) for sigma in (self.start, self.end))
        return messages.ControlUse(self.net.name, hint, self.strength, start, end, self.types)


def _as_float32(sigma: float) -> float:
    """As samplers have their sigmas: one at the very end of a range is in it."""
    return float(torch.tensor(sigma, dtype=torch.float32))
