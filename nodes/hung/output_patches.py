"""Patches that ComfyUI's UNet calls before each output block, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .patches import Call, Patch

OUTPUT = "output_block_patch"


def orders_of(knows: Callable[[Patch], bool], call: Call) -> list[tuple[int, Any]]:
    """Those of one kind: (its place among all that are called there, the function)."""
    functions = call.options.get("patches", {}).get(OUTPUT, [])
    return [(order, f) for order, f in enumerate(functions) if knows(Patch(OUTPUT, None, f))]
