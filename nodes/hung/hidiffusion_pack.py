"""What the nodes of the pack comfyui_jankhidiffusion have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy.ldm.modules.diffusionmodules import openaimodel

from ...parallel_backend.errors import UnsupportedError
from .pack_version import pack_and_version
from .patches import origin
from .refusal import ELSEWHERE, LOCALLY

_VERSION = "0.8.5"
_SCALES, _ADDS = "utils:scale_samples", "raunet:State.hd_apply_control"


def check_known(node: str, function: Any, settings: Iterable[str] | None, known: Iterable[str]) -> None:
    """Raises: UnsupportedError: the node has other `settings` than the known ones, None for none at all; or it resizes by another
    pack's code."""
    if settings is None or set(settings) != set(known):
        raise UnsupportedError(
            f"{pack_and_version(function)} hangs another {node} than the known one on the MODEL.",
            f"Use version {_VERSION} of that pack, or {LOCALLY}.",
        )
    resizes = function.__globals__.get("scale_samples")
    if origin(resizes) != _SCALES:
        raise UnsupportedError(
            f"{node} resizes by {origin(resizes)}, which another pack (ComfyUI-bleh) has put there.", ELSEWHERE
        )


def number_of(config: Any, name: str) -> float:
    """One of a node's settings. Raises: UnsupportedError: it is no number, as only its text of parameters can have it."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedError(f"{name} is {value!r}, which is no number.", "Give a number in the node's parameters.")
    return float(value)


def scales_residuals() -> bool:
    """Whether the pack has put its own function for ControlNets in the place of ComfyUI's, for all MODELs of the process.

    It resizes a ControlNet's output to that which it is added to; ComfyUI's own leaves it out.
    """
    return origin(openaimodel.apply_control) == _ADDS
