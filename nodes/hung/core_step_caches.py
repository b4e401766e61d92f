"""Core's step caches, EasyCache and LazyCache: they decide by whole latents which evaluations are left out, in ComfyUI's process.

EasyCache stands around the network's forward, which a parallel MODEL has as well; LazyCache around the guider's. Neither patches
anything inside: what hangs in the transformer options is what they remember.
"""

from __future__ import annotations

from typing import Any

from .patches import origin

_OPTION = "easycache"
_HOLDERS = ("nodes_easycache:EasyCacheHolder", "nodes_easycache:LazyCacheHolder")


def is_step_cache(option: str, value: Any) -> bool:
    """Whether a transformer option is what one of them remembers."""
    return option == _OPTION and origin(value) in _HOLDERS
