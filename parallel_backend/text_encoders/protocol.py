"""What encodes prompts, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class TextEncoders(Protocol):
    """Makes a model's conditioning of words. An object of yours with these two can be given to `Backend.load_model`."""

    @property
    def default_size(self) -> int | None:
        """Pixels of a side where none is asked for; None: as large as the model was trained for."""
        ...

    def encode(self, prompts: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Context (B, L, E) and pooled (B, A), on the CPU, of B prompts; None is that no prompt was given.

        Args:
            device, dtype: to compute on and in; no memory of a GPU is held afterwards.
        """
        ...
