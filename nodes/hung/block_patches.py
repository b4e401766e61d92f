"""Patches that ComfyUI's UNet calls at each of its blocks, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .patches import Call, Patch

INPUT, AFTER_SKIP, OUTPUT = "input_block_patch", "input_block_patch_after_skip", "output_block_patch"


def orders_of(knows: Callable[[Patch], bool], call: Call, kind: str = OUTPUT) -> list[tuple[int, Any]]:
    """Those that are called at one place, and known: (its place among all that are called there, the function)."""
    functions = call.options.get("patches", {}).get(kind, [])
    return [(order, f) for order, f in enumerate(functions) if knows(Patch(kind, None, f))]


def acts(start: float, end: float, call: Call) -> bool:
    """Whether what acts between these sigmas does in this call."""
    return start >= end and start > 0 if call.sigma is None else start >= call.sigma >= end


def range_of(start: float, end: float, call: Call) -> dict[str, float]:
    """What extras of a whole sampling say of when they act."""
    return {} if call.sigma is not None else {"start": start, "end": max(end, 0.0)}
