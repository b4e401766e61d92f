"""Transformer options that patch nothing."""

from __future__ import annotations

# What stock sampling passes to a model's forward by itself, or says of the part of a latent that it passes.
FORWARD_OPTIONS = frozenset(
    {
        *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "prefetch_dynamic_vbars"),
        "context_window",
    }
)
# What networks of other families alone read: rotary positions, which no SD3 and no SDXL has.
OF_OTHER_FAMILIES = frozenset({"rope_options"})
