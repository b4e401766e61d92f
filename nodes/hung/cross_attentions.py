"""The attentions to the prompt of ComfyUI's UNet, as patches are called there for a latent of some size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...parallel_backend.rpc.extras import PlaceName
from .patches import Call
from .unet_places import sides_at, transformer_layers


@dataclass(frozen=True)
class CrossAttention:
    """`transformer` counts the layers of blocks in the order in which the network runs them, as ComfyUI tells patches."""

    place: PlaceName
    transformer: int
    sides: tuple[int, int]
    width: int
    heads: int

    @property
    def tokens(self) -> int:
        rows, columns = self.sides
        return rows * columns

    @property
    def options(self) -> dict[str, Any]:
        """What a patch is told of it."""
        side, number, index = self.place
        at = {"block": (side, number), "block_index": index, "transformer_index": self.transformer}
        return at | {"n_heads": self.heads, "dim_head": self.width // self.heads, "attn_precision": None}


def cross_attentions(call: Call) -> Mapping[PlaceName, CrossAttention]:
    """By place, for a call's latent."""
    found = {}
    for transformer, (block, layer) in enumerate(transformer_layers(call.network)):
        for index, blocks in enumerate(layer.transformer_blocks):
            place, width = (*block, index), blocks.attn2.to_q.out_features
            found[place] = CrossAttention(place, transformer, sides_at(place, call), width, blocks.n_heads)
    return found
