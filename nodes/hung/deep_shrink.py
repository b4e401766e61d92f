"""Deep shrink, core's PatchModelAddDownscale: inner blocks of a UNet see a smaller picture than the outer ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, Downscale
from .block_patches import AFTER_SKIP, INPUT, OUTPUT, acts, orders_of, range_of
from .hidiffusion_pack import scales_residuals
from .patches import Call, Kind, Patch, closed_over, in_node, is_made_by
from .refusal import ELSEWHERE

_NODE = "nodes_model_downscale:PatchModelAddDownscale"
# By what ComfyUI calls its functions' places, their names in the node and what they hold.
_FUNCTIONS = {
    INPUT: ("input_block_patch", {"block_number", "sigma_start", "sigma_end", "downscale_factor", "downscale_method"}),
    OUTPUT: ("output_block_patch", {"upscale_method"}),
}
_FUNCTIONS[AFTER_SKIP] = _FUNCTIONS[INPUT]


def _knows(patch: Patch) -> bool:
    if patch.kind not in _FUNCTIONS:
        return False
    name, held = _FUNCTIONS[patch.kind]
    return is_made_by(patch, patch.kind, in_node(_NODE, name), held)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: nothing that resizes back, without which the network can't go on.

    Of several, the first one's function resizes back for all: it acts at every sigma, and after it the sizes are alike.
    """
    shrinking = [
        extra
        for kind in (INPUT, AFTER_SKIP)
        for first, function in orders_of(_knows, call, kind)
        for extra in _of(function, call, {"after_skip": kind == AFTER_SKIP, "first": first})
    ]
    if not shrinking:
        return
    back = orders_of(_knows, call)
    if not back:
        raise UnsupportedError("PatchModelAddDownscale makes a picture smaller that nothing resizes back.", ELSEWHERE)
    order, function = back[0]
    given = {"back": closed_over(function)["upscale_method"], "order": order, "scales_residuals": scales_residuals()}
    for extra in shrinking:
        yield Downscale(**extra, **given)


def _of(function: Any, call: Call, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`found` and what it does; nothing where it never acts: at a block that the model hasn't, or at no sigma."""
    made_with = closed_over(function)
    start, end, block = float(made_with["sigma_start"]), float(made_with["sigma_end"]), made_with["block_number"]
    if acts(start, end) and 0 <= block < len(call.network.input_blocks):  # type: ignore[arg-type]
        found |= {"block": int(block), "factor": float(made_with["downscale_factor"])}
        found |= {"method": made_with["downscale_method"]}
        yield found | range_of(start, end)


KIND = Kind(_knows, _extras)
