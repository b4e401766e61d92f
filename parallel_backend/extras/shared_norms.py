"""Group norms by each row's pixels and those of another row together.

Source: the node StyleAligned Batch Align; the paper (Hertz et al. 2023, arXiv 2312.02133) shares attention alone.
Shapes: B this rank's rows, S parts of the image, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..distributed.sites import UNetSites
from ..models.spread import chosen
from ..rpc.extras import SharedNorms
from .sources import FromSources, Sources, source_of
from .target import Target


@dataclass(frozen=True, kw_only=True)
class NormedTogether(FromSources):
    """Of all group norms.

    Comm: where sources are on other ranks, two numbers for each of their groups and bands to all of these, at each norm.
    """

    name = "shared norms"

    @classmethod
    def read(cls, asked: SharedNorms, target: Target, range_of: dict[str, Any]) -> NormedTogether:
        """Raises: InputError: rows that don't fit their sources."""
        return cls(sources=source_of(asked.rows, asked.sources, cls.name), **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sources = Sources.of(self.sources, self.spread, self.name)
        sites.norm_rows = partial(_others, sources, sources.numbers(self.sources[row] for row in self.own_rows))


def _others(sources: Sources, numbers: Sequence[int], every_S2BG: Tensor) -> Tensor:
    by_row = sources.gather(every_S2BG.movedim(2, 0).contiguous())
    return chosen(by_row, numbers).movedim(0, 2)
