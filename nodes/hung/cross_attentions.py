"""The attentions to the prompt of ComfyUI's UNet, as patches are called there for a latent of some size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

from ...parallel_backend.rpc.extras import PlaceName


@dataclass(frozen=True)
class CrossAttention:
    """`transformer` counts the layers of blocks in the order in which the network runs them, as ComfyUI tells patches."""

    place: PlaceName
    transformer: int
    tokens: int
    width: int
    heads: int

    @property
    def options(self) -> dict[str, Any]:
        """What a patch is told of it."""
        side, number, index = self.place
        at = {"block": (side, number), "block_index": index, "transformer_index": self.transformer}
        return at | {"n_heads": self.heads, "dim_head": self.width // self.heads, "attn_precision": None}


def cross_attentions(network: Any, height: int, width: int) -> Mapping[PlaceName, CrossAttention]:
    """By place. An output block works at the size of the input block whose output it takes in."""
    return {attention.place: attention for attention in _all(network, height, width)}


def _all(network: Any, height: int, width: int) -> Iterator[CrossAttention]:
    transformer = 0
    sides, taken_in = (height, width), []
    for side, blocks in (("input", network.input_blocks), ("middle", [network.middle_block])):
        for number, block in enumerate(blocks):
            for layer in block if block is not None else ():
                if isinstance(layer, Downsample):
                    sides = (-(-sides[0] // 2), -(-sides[1] // 2))
                yield from _of_layer(layer, (side, number), transformer, sides)
                transformer += hasattr(layer, "transformer_blocks")
            if side == "input":
                taken_in.append(sides)
    for number, block in enumerate(network.output_blocks):
        sides = taken_in.pop()
        for layer in block:
            yield from _of_layer(layer, ("output", number), transformer, sides)
            transformer += hasattr(layer, "transformer_blocks")


def _of_layer(layer: Any, block: tuple[str, int], transformer: int, sides: tuple[int, int]) -> Iterator[CrossAttention]:
    for index, blocks in enumerate(getattr(layer, "transformer_blocks", ())):
        width = blocks.attn2.to_q.out_features
        yield CrossAttention((*block, index), transformer, sides[0] * sides[1], width, blocks.n_heads)
