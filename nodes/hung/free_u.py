"""FreeU and FreeU_V2 of core: what output blocks join is weighed anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...parallel_backend.rpc.extras import AnyExtra, FreeU
from .block_patches import OUTPUT, orders_of
from .patches import Call, Kind, Patch, closed_over, in_node, is_made_by, origin

# By where the function was written, whether the image's factor differs by cell.
_KNOWN = {
    written: node == "FreeU_V2"
    for node in ("FreeU", "FreeU_V2")
    for written in in_node(f"nodes_freelunch:{node}", "output_block_patch")
}


def _knows(patch: Patch) -> bool:
    return is_made_by(patch, OUTPUT, _KNOWN, {"scale_dict", "on_cpu_devices"})


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    for order, function in orders_of(_knows, call):
        by_channels = closed_over(function)["scale_dict"]
        factors = [(int(channels), float(b), float(s)) for channels, (b, s) in by_channels.items()]
        yield FreeU(factors=factors, by_structure=_KNOWN[origin(function)], order=order)


KIND = Kind(_knows, _extras)
