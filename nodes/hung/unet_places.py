"""The transformer blocks of ComfyUI's UNet, by the places that patches name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import PlaceName
from .patches import Call, Patch


def all_places(network: Any) -> Iterator[PlaceName]:
    """In the order in which the network runs them."""
    return (place for place, _ in blocks_of(network))


def blocks_of(network: Any) -> Iterator[tuple[PlaceName, Module]]:
    """As `all_places`, each with its block; none of another network."""
    if not hasattr(network, "input_blocks"):
        return
    sides = {"input": network.input_blocks, "middle": [network.middle_block], "output": network.output_blocks}
    for side, blocks in sides.items():
        for number, block in enumerate(blocks):
            for layer in block if block is not None else ():
                for index, transformer in enumerate(getattr(layer, "transformer_blocks", ())):
                    yield (side, number, index), transformer


def sides_at(place: PlaceName, call: Call) -> tuple[int, int]:
    """Rows and columns of tokens at a place."""
    network: Any = call.network
    side, number, _ = place
    inputs = len(network.input_blocks)
    # Blocks on the way down, each of which may halve both sides; an output block has the sides of the input block that it joins.
    passed = {"input": number, "output": inputs - 1 - number}.get(side, inputs - 1)
    halvings = sum(
        type(layer).__name__ == "Downsample" for block in network.input_blocks[: passed + 1] for layer in block
    )
    rows, columns = (-(-length // 2**halvings) for length in call.shape[-2:])
    return rows, columns


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
