"""What only newer cores take, left out on older ones: each is asked for what it knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io


def known_to(function: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Those of the settings that a function or class of the core takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in known}


def search_aliases(*names: str) -> dict[str, list[str]]:
    """By what else people look for a node: for its Schema, since ComfyUI 0.11."""
    return known_to(io.Schema, search_aliases=list(names))


# Folded away in the editor: for an Input, since ComfyUI 0.10.
ADVANCED: dict[str, bool] = known_to(io.Int.Input, advanced=True)
