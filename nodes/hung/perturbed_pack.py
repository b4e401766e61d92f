"""Guidance functions of the pack sd-perturbed-attention: all hold their range of sigmas, those of attentions their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .patches import Hung, Patch, closed_over

_HELD = {"scale", "sigma_start", "sigma_end"}


def hung_by_pack(function: Any, *, attention: Any = None, options: Mapping[str, Any] | None = None) -> Hung | None:
    """What one hangs: `attention` at each of its blocks. None of another version, and where it does nothing."""
    made_with = closed_over(function)
    if not made_with.keys() >= _HELD or made_with["scale"] == 0:
        return None
    blocks = made_with.get("blocks", ()) if attention is not None else ()
    places = [tuple(part for part in block if part is not None) for block in blocks]
    patches = [Patch("attn1", place, attention) for place in places]
    return Hung(patches, options or {}, 0, float(made_with["sigma_start"]), float(made_with["sigma_end"]))
