"""Where the rows of an evaluation are: over which ranks, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.collectives import all_gather
from ..distributed.mesh import MeshAxis
from .extra import Row


@dataclass(frozen=True)
class Spread:
    """The rows that are evaluated at once, this rank's among them.

    Args:
        rows: all, in the order in which `gather` joins them.
        stages: axes over which they are spread, the innermost first, with how many rows each rank of that axis has.
    """

    rows: tuple[Row, ...] = ()
    stages: tuple[tuple[MeshAxis, tuple[int, ...]], ...] = ()

    @property
    def own(self) -> range:
        """This rank's places in `rows`."""
        first = sum(sum(sizes[: axis.rank]) for axis, sizes in self.stages)
        axis_and_sizes = self.stages[0] if self.stages else None
        count = len(self.rows) if axis_and_sizes is None else axis_and_sizes[1][axis_and_sizes[0].rank]
        return range(first, first + count)

    def only(self, numbers: Sequence[int]) -> Spread:
        """That of these rows alone, by their places in `rows`, which rise."""
        stages = []
        for depth, (axis, sizes) in enumerate(self.stages):
            first, counts = sum(sum(s[: a.rank]) for a, s in self.stages[depth + 1 :]), []
            for size in sizes:
                counts.append(sum(first <= number < first + size for number in numbers))
                first += size
            stages.append((axis, tuple(counts)))
        return Spread(tuple(self.rows[number] for number in numbers), tuple(stages))

    def gather(self, x: Tensor) -> Tensor:
        """All rows, from every rank's own. Comm: one all-gather of x over each axis."""
        for axis, sizes in self.stages:
            x = all_gather(x, 0, sizes, axis)
        return x


def chosen(x: Tensor, numbers: Sequence[int]) -> Tensor:
    """The rows of these numbers, of which nothing is told to a GPU but where to copy from."""
    return torch.cat([x[number : number + 1] for number in numbers]) if numbers else x[:0]


# Of rows of which nobody asks.
UNKNOWN = Spread()
