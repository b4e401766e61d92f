"""Joint blocks of an MMDiT that are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..distributed.sites import TransformerSites
from ..models.extra import Extra
from ..rpc.extras import SkipBlocks
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class SkippedBlocks(Extra):
    """Text and image tokens pass these blocks as they came."""

    blocks: tuple[int, ...]
    by_token = True
    omits_attention = True
    name = "skipped blocks"

    @classmethod
    def read(cls, asked: SkipBlocks, target: Target, range_of: dict[str, Any]) -> SkippedBlocks:
        """Raises: InputError: blocks that the model hasn't."""
        check_known(asked.blocks, range(target.config.depth), "joint block", target)
        return cls(blocks=tuple(sorted(set(asked.blocks))), **range_of)

    def on_transformer(self, sites: TransformerSites) -> None:
        sites.skipped.update(self.blocks)
