"""Patches that live inside the model, in its transformer options: of attention and of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .refusal import is_set

# What stock sampling passes to a model's forward by itself, or says of the part of a latent that it passes.
FORWARD_OPTIONS = frozenset(
    {
        *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "prefetch_dynamic_vbars"),
        "context_window",
    }
)


def transformer_patches(options: Mapping[str, Any]) -> Iterator[str]:
    """Patches in transformer_options that live inside the model: attention and block patches."""
    for kind in ("patches", "patches_replace"):
        for name, entries in options.get(kind, {}).items():
            if entries:
                yield f"{kind} {name!r}"
    for key, value in options.items():
        if key not in FORWARD_OPTIONS and key not in ("patches", "patches_replace") and is_set(value):
            yield f"transformer option {key!r}"
