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


def acts(start: float, end: float) -> bool:
    """Whether what acts between these sigmas ever does."""
    return start >= end and start > 0


def range_of(start: float, end: float) -> dict[str, float]:
    """What extras say of when they act."""
    return {"start": start, "end": max(end, 0.0)}
