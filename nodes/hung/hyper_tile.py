"""HyperTile, core's: self-attentions in tiles of queries.

Which tiles, the node says itself: it is asked with queries that have no values, for each attention in the network's order, as it draws
among tilings for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, PlaceName, TiledAttention
from .patches import Call, Kind, Patch, closed_over, in_node, is_made_by, replacement_at
from .refusal import ELSEWHERE
from .unet_places import all_places, sides_at

_NODE = "nodes_hypertile:HyperTile"
_TILING, _SWAP = "temp", "swap_size"
_HOLDS = {"hypertile_in": {"latent_tile_size", "max_depth", "scale_depth", _SWAP, _TILING}, "hypertile_out": {_TILING}}
_KINDS = {"hypertile_in": "attn1_patch", "hypertile_out": "attn1_output_patch"}
# Of so many tilings it takes the first always.
_NO_CHOICE = 2


def _is(patch: Patch, function: str) -> bool:
    return is_made_by(patch, _KINDS[function], in_node(_NODE, function), _HOLDS[function])


def _knows(patch: Patch) -> bool:
    return any(_is(patch, function) for function in _HOLDS)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: two of these nodes, or another patch that replaces an attention which is tiled."""
    cuts = [patch for patch in patches if _is(patch, "hypertile_in")]
    if len(cuts) != 1 or len(patches) != 2:
        raise UnsupportedError("A parallel MODEL can't honour more than one HyperTile.", ELSEWHERE)
    tiles = {place: tiling for place in all_places(call.network) if (tiling := _asked(cuts[0].function, place, call))}
    for place in tiles:
        if (other := replacement_at(place, "attn1", call.options)) is not None:
            raise UnsupportedError(f"A parallel MODEL can't honour HyperTile beside {other.told}.", ELSEWHERE)
    if tiles:
        yield TiledAttention(places=list(tiles), tiles=list(tiles.values()))


def _asked(function: Any, place: PlaceName, call: Call) -> tuple[int, int, int, int] | None:
    """Tiles along both sides of its grid, and the grid's sides, for this attention now; None where it stays whole."""
    rows, columns = sides_at(place, call)
    tiling = function.__closure__[function.__code__.co_freevars.index(_TILING)]
    tiling.cell_contents = None
    nothing = torch.empty(1, rows * columns, 1, device="meta")
    function(nothing, nothing, nothing, {"original_shape": list(call.shape)})
    asked, tiling.cell_contents = tiling.cell_contents, None
    return asked  # type: ignore[no-any-return]


def _step_by_step(patch: Patch) -> Iterator[str]:
    if _is(patch, "hypertile_in") and closed_over(patch.function)[_SWAP] > _NO_CHOICE:
        yield "HyperTile with a swap_size above 2, which draws tiles anew for each evaluation"


def draws(patch: Patch) -> bool:
    """Whether it draws among tilings: with a swap_size of 1 there is one."""
    return _is(patch, "hypertile_in") and closed_over(patch.function)[_SWAP] > 1


KIND = Kind(_knows, _extras, step_by_step=_step_by_step)
