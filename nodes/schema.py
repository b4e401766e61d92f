"""What only newer cores can show of a node, left out on older ones: each is asked for what it knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io


def as_known(make: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Those of the settings that `make` takes."""
    known = inspect.signature(make).parameters
    return {name: value for name, value in settings.items() if name in known}


def search_aliases(*names: str) -> dict[str, list[str]]:
    """By what else people look for a node: for its Schema, since ComfyUI 0.11."""
    return as_known(io.Schema, search_aliases=list(names))


# Folded away in the editor: for an Input, since ComfyUI 0.10.
ADVANCED: dict[str, bool] = as_known(io.Int.Input, advanced=True)
