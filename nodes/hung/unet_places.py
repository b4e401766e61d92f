"""The transformer blocks of ComfyUI's UNet, by the places that patches name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import DownsampleByFour, Downscale, PlaceName, Rescale
from .patches import Call, Patch


def transformer_layers(network: Any) -> Iterator[tuple[tuple[str, int], Any]]:
    """Layers of transformer blocks, each with the block that it is in, in the order in which the network runs them; of a UNet alone."""
    if not hasattr(network, "input_blocks"):
        return
    sides = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    for side, blocks in sides.items():
        for number, block in enumerate(blocks):
            for layer in block if block is not None else ():
                if hasattr(layer, "transformer_blocks"):
                    yield (side, number), layer


def blocks_of(network: Any) -> Iterator[tuple[PlaceName, Module]]:
    """Transformer blocks by their places, in the order in which the network runs them; none of another network."""
    for block, layer in transformer_layers(network):
        for index, transformer in enumerate(layer.transformer_blocks):
            yield (*block, index), transformer


def all_places(network: Any) -> Iterator[PlaceName]:
    """As `blocks_of`, without these."""
    return (place for place, _ in blocks_of(network))


def sides_at(place: PlaceName, call: Call) -> tuple[int, int]:
    """Rows and columns of tokens at a place, where nothing resizes the picture."""
    return sides_within(call)[place[:2]]


def sides_within(
    call: Call, resizes: Sequence[Downscale | Rescale | DownsampleByFour] = ()
) -> dict[tuple[str, int], tuple[int, int]]:
    """Rows and columns that each block sees; an output block sees those of the skip connection that it joins."""
    network: Any = call.network
    height, width = call.shape[-2:]
    found, skips, sides = {}, [], (height, width)
    by_four = {extra.block: extra for extra in resizes if isinstance(extra, DownsampleByFour)}
    others = sorted((e for e in resizes if not isinstance(e, DownsampleByFour)), key=lambda extra: extra.first)
    for number, block in enumerate(network.input_blocks):
        if any(type(layer).__name__ == "Downsample" for layer in block):
            sides = by_four[number].sides(*sides) if number in by_four else (-(-sides[0] // 2), -(-sides[1] // 2))
        found["input", number] = sides
        here = [e for e in others if number in (e.blocks if isinstance(e, Rescale) else (e.block,))]
        for extra in (extra for extra in here if not extra.after_skip):
            sides = extra.sides(*sides)
        skips.append(sides)
        for extra in (extra for extra in here if extra.after_skip):
            sides = extra.sides(*sides)
    found["middle", 0] = sides
    found |= {("output", number): skip for number, skip in enumerate(reversed(skips))}
    return found


def places_of(patch: Patch, call: Call) -> list[PlaceName]:
    """Those that a replacement is for: one transformer block, or all of a block that have no replacement of their own.

    Where the network has none there, nothing calls the patch.
    """
    taken = call.options.get("patches_replace", {}).get(patch.kind, {})
    return [p for p in all_places(call.network) if patch.place == (p if p in taken else p[:2])]


def blocks_outside(blocks: Iterable[tuple[str, int, int | None]], network: Any, node: str) -> Iterator[str]:
    """Those that a UNet hasn't, as a node's settings name them: a block, or one transformer block of it. Others have none at all."""
    if not hasattr(network, "input_blocks"):
        return
    counts = {"input": len(network.input_blocks), "middle": 1, "output": len(network.output_blocks)}
    for side, number, index in blocks:
        inside = number < counts.get(side, 0)
        if not (inside if index is None else (side, number, index) in all_places(network)):
            told = f"{side} {number}" if index is None else f"{side} {number} {index}"
            yield f"the block {told} of {node}: this model has {', '.join(f'{n} {s}' for s, n in counts.items())} blocks"
