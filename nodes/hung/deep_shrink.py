"""Deep shrink, core's PatchModelAddDownscale: inner blocks of a UNet see a smaller picture than the outer ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, Downscale
from .known_functions import closed_over
from .output_patches import OUTPUT, orders_of
from .patches import Call, Kind, Patch, origin
from .refusal import ELSEWHERE

_INPUT, _AFTER_SKIP = "input_block_patch", "input_block_patch_after_skip"
# By what ComfyUI calls its functions' places, their names in the node and what they hold. Older cores' nodes have a method of
# another name.
_FUNCTIONS = {
    _INPUT: ("input_block_patch", {"block_number", "sigma_start", "sigma_end", "downscale_factor", "downscale_method"}),
    OUTPUT: ("output_block_patch", {"upscale_method"}),
}
_FUNCTIONS[_AFTER_SKIP] = _FUNCTIONS[_INPUT]
_METHODS = ("execute", "patch")


def _knows(patch: Patch) -> bool:
    if patch.kind not in _FUNCTIONS:
        return False
    name, held = _FUNCTIONS[patch.kind]
    known = [f"nodes_model_downscale:PatchModelAddDownscale.{method}.<locals>.{name}" for method in _METHODS]
    return origin(patch.function) in known and closed_over(patch.function).keys() == held


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: nothing that resizes back, without which the network can't go on.

    Of several, the first one's function resizes back for all: it acts at every sigma, and after it the sizes are alike.
    """
    shrinking = [extra for patch in patches if patch.kind != OUTPUT for extra in _of(patch, call)]
    if not shrinking:
        return
    back = orders_of(_knows, call)
    if not back:
        raise UnsupportedError("PatchModelAddDownscale makes a picture smaller that nothing resizes back.", ELSEWHERE)
    order, function = back[0]
    for extra in shrinking:
        yield Downscale(**extra, back=closed_over(function)["upscale_method"], order=order)


def _of(patch: Patch, call: Call) -> Iterator[dict[str, Any]]:
    """What it does; nothing where it never acts: at a block that the model hasn't, or at no sigma."""
    made_with = closed_over(patch.function)
    start, end, block = float(made_with["sigma_start"]), float(made_with["sigma_end"]), made_with["block_number"]
    if start >= end and 0 <= block < len(call.network.input_blocks):  # type: ignore[arg-type]
        found: dict[str, Any] = {"block": int(block), "factor": float(made_with["downscale_factor"])}
        found |= {"after_skip": patch.kind == _AFTER_SKIP, "method": made_with["downscale_method"]}
        yield found | {"start": start, "end": end}


KIND = Kind(_knows, _extras)
