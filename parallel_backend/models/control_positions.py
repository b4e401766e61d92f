"""Where image tokens are, for models without a table of it: the shorter side goes from 0 to 15, its middle is the image's.

Shapes: L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIDDLE = 7.5


@dataclass
class CentredSines:
    """Sines and cosines of a token's column, then of its row; those of the last size are kept.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, in two dimensions as Esser et al. 2024 (arXiv 2403.03206).
    """

    hidden: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._last: tuple[tuple[int, int, tuple[tuple[int, int], ...]], Tensor] | None = None

    def rows(self, rows: int, columns: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """(L, D) for tokens (first, one past last) of an image of rows x columns tokens."""
        key = (rows, columns, tuple(ranges))
        if self._last is None or self._last[0] != key:
            token = torch.cat([torch.arange(start, stop) for start, stop in ranges])
            count = self.hidden // 4
            rates = 10_000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
            column = _centred(columns, rows)[token % columns][:, None] * rates
            row = _centred(rows, columns)[token // columns][:, None] * rates
            waves = [column.sin(), column.cos(), row.sin(), row.cos()]
            self._last = key, torch.cat(waves, dim=1).to(device=self.device, dtype=self.dtype)
        return self._last[1]


def _centred(count: int, other: int) -> Tensor:
    """Where `count` tokens are along a side, beside one of `other` tokens; a single one is at the beginning."""
    half = MIDDLE * count / min(count, other)
    return torch.linspace(MIDDLE - half, MIDDLE + half, count, dtype=torch.float64)
