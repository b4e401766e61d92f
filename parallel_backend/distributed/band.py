"""An image cut into horizontal bands, one for each rank of an axis, and what the bands tell each other.

Shapes: B batch, C channels, Y rows of the band, X columns, L tokens, R ranks, N elements of a message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..fused.group_norm import facing_parts, shares_of
from .collectives import Handle, start_all_gather
from .mesh import MeshAxis
from .stale import Step

if TYPE_CHECKING:
    from .sites import UNetSites


@dataclass(frozen=True)
class Cut:
    """How an image is cut in bands, one for each rank of `axis`: the `rows` of every band, and the `columns` of the image."""

    axis: MeshAxis
    rows: tuple[int, ...]
    columns: int

    def halved(self, times: int) -> Cut:
        """At the scale at which sides were halved that often, each time rounded up."""
        unit = 2**times
        return Cut(self.axis, tuple(-(-rows // unit) for rows in self.rows), -(-self.columns // unit))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the image."""
        return sum(self.rows), self.columns

    @property
    def own_rows(self) -> tuple[int, int]:
        """First and one-past-last row of this rank's band."""
        start = sum(self.rows[: self.axis.rank])
        return start, start + self.rows[self.axis.rank]


@dataclass
class Band:
    """How the image of the current request is cut, and where in its job it is. All layers of a model share one.

    `rows` of every band and `columns` of the image are those of the model's input. `prompt_kv` are the keys and values of the
    prompt, (B, L, 2 * D), by the slot of the attention that takes them. `sites`: where extras act, if any do.
    """

    axis: MeshAxis = field(default_factory=lambda: MeshAxis("band"))
    rows: list[int] = field(default_factory=lambda: [1])
    columns: int = 1
    step: Step = field(default_factory=Step)
    prompt_kv: Mapping[str, Tensor] = field(default_factory=dict)
    sites: UNetSites | None = None

    @property
    def cut(self) -> Cut:
        return Cut(self.axis, tuple(self.rows), self.columns)

    @cut.setter
    def cut(self, cut: Cut) -> None:
        self.axis, self.rows, self.columns = cut.axis, list(cut.rows), cut.columns

    @property
    def own_rows(self) -> tuple[int, int]:
        """As `Cut.own_rows`."""
        return self.cut.own_rows

    def rows_like(self, x_BCYX: Tensor) -> list[int]:
        """Rows of every band at the scale of `x`, this rank's band of it."""
        if x_BCYX.shape[3] > self.columns:
            return [rows * (x_BCYX.shape[3] // self.columns) for rows in self.rows]
        return next(rows for rows, columns in self._halvings() if columns == x_BCYX.shape[3])

    def tokens_like(self, x_BLD: Tensor) -> list[int]:
        """Tokens of every band at the scale at which this rank's band has as many as `x`."""
        if self.axis.degree == 1:
            return [x_BLD.shape[1]]
        rows, columns = next(
            (rows, columns) for rows, columns in self._halvings() if rows[self.axis.rank] * columns == x_BLD.shape[1]
        )
        return [count * columns for count in rows]

    def shares_like(self, x_BCYX: Tensor) -> Tensor:
        """(R,): the share of the image that each band has."""
        return shares_of(tuple(self.rows_like(x_BCYX)), x_BCYX.device)

    def _halvings(self) -> Iterator[tuple[list[int], int]]:
        rows, columns = self.rows, self.columns
        while True:
            yield rows, columns
            if columns == 1:
                return
            rows, columns = [-(-count // 2) for count in rows], -(-columns // 2)

    def tell(self, slot: str, message_N: Tensor) -> Handle:
        """Every band's message (R, N): all fresh, or in displaced steps those of the last evaluation.

        A message holds a few rows and numbers, so that all of it goes to every rank: one exchange, where rows to neighbours
        and numbers to all would be two. In displaced steps the largest part of what travels are keys and values anyway.
        Comm: N elements to every rank.
        """
        stale = self.step.stale
        if stale is not None and self.step.phase == "displaced":
            return Handle(stale.swap(slot, lambda sent: sent.copy_(message_N)))
        handle = start_all_gather(message_N.unsqueeze(0), self.axis)
        if stale is not None:
            stale.keep(slot, handle.result)
        return handle

    def facing(self, every_RN: Tensor, x_BCYX: Tensor, above: int, below: int) -> tuple[Tensor | None, Tensor | None]:
        """Of every band's `facing_rows`, those that lie around this one: (B, above, X, C) and (B, below, X, C); None at the edges."""
        B, C, _, X = x_BCYX.shape
        down, rank = B * below * X * C, self.axis.rank
        top = every_RN[rank - 1, down:].view(B, above, X, C) if above and rank > 0 else None
        is_last = rank == self.axis.degree - 1
        bottom = every_RN[rank + 1, :down].view(B, below, X, C) if below and not is_last else None
        return top, bottom


def facing_rows(x_BCYX: Tensor, above: int, below: int) -> Tensor:
    """What the bands around this one see of it, flat: the first rows for the band above, whose `below` they are, then the last ones.

    Every band has at least max(above, below) rows: the caller sees to it.
    """
    return torch.cat(facing_parts(x_BCYX, above, below))


def with_rows_around(
    x_BCYX: Tensor, above: int, below: int, top_BYXC: Tensor | None, bottom_BYXC: Tensor | None
) -> Tensor:
    """The band between the rows around it; zeros where the image ends."""
    B, C, _, X = x_BCYX.shape
    parts = [x_BCYX]
    for at, count, rows in ((0, above, top_BYXC), (2, below, bottom_BYXC)):
        if count:
            blank = x_BCYX.new_zeros(B, count, X, C) if rows is None else rows
            parts.insert(at, blank.permute(0, 3, 1, 2))
    if not x_BCYX.is_contiguous(memory_format=torch.channels_last):
        # Parts of mixed layouts would be joined in the one that convolutions are slower on.
        parts = [part.contiguous() for part in parts]
    return torch.cat(parts, dim=2)
