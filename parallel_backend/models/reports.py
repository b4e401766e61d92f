"""Extras whose evaluation gives back a few numbers of each row, beside the output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .extra import Extra


@dataclass(frozen=True, kw_only=True)
class ReportingExtra(Extra):
    """One of them. No graph is made of its evaluation, and none of a whole sampling: nobody would take the numbers.

    Args:
        width: how many numbers of a row.
    """

    width: int
    has_memory = True
    _noted: list[Tensor] = field(init=False, repr=False, compare=False, default_factory=list)

    def note(self, numbers_BN: Tensor) -> None:
        """Those of this rank's rows, alike on all ranks that have the same rows."""
        self._noted[:] = [numbers_BN]

    def take(self, device: torch.device) -> Tensor:
        """(B, N), fp32: what the last evaluation has noted; of no rows where it had none."""
        return self._noted.pop().float() if self._noted else torch.zeros(0, self.width, device=device)
