"""Group norms by each row's pixels and those of another row together.

Source: the node StyleAligned Batch Align; the paper (Hertz et al. 2023, arXiv 2312.02133) shares attention alone.
Shapes: B this rank's rows, S parts of the image, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..distributed.sites import UNetSites
from ..models.extra import Extra
from ..models.spread import UNKNOWN, Spread, chosen
from ..rpc.extras import SharedNorms
from .sources import SourceOf, Sources, check_named, source_of
from .target import Target


@dataclass(frozen=True, kw_only=True)
class NormedTogether(Extra):
    """Of all group norms.

    Comm: where sources are on other ranks, two numbers for each of their groups and bands to all of these, at each norm.
    """

    sources: SourceOf
    spread: Spread = UNKNOWN
    pairs = True
    across_batch = True
    name = "shared norms"

    @classmethod
    def read(cls, asked: SharedNorms, target: Target, range_of: dict[str, Any]) -> NormedTogether:
        """Raises: InputError: rows that don't fit their sources."""
        return cls(sources=source_of(asked.rows, asked.sources, cls.name), **range_of)

    def check(self, branches: Iterable[int]) -> None:
        check_named(self.sources, branches, self.name)

    def among(self, spread: Spread) -> NormedTogether:
        return replace(self, spread=spread)

    def on_unet(self, sites: UNetSites) -> None:
        sources = Sources.of(self.sources, self.spread, self.name)
        own = self.spread.rows[self.spread.own.start : self.spread.own.stop]
        sites.norm_rows = partial(_others, sources, [sources.rows.index(self.sources[row]) for row in own])


def _others(sources: Sources, numbers: Sequence[int], every_S2BG: Tensor) -> Tensor:
    by_row = sources.gather(every_S2BG.movedim(2, 0).contiguous())
    return chosen(by_row, numbers).movedim(0, 2)
