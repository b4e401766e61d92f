"""What of a file is a VAE, and of which kind, known by its names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection

_FIRST = "decoder.conv_in.weight"
_PREFIXES = ("first_stage_model.", "vae.", "")


def vae_prefix(names: Collection[str]) -> str | None:
    """What stands before the names of an AutoencoderKL's tensors; None where there is none."""
    return next((prefix for prefix in _PREFIXES if prefix + _FIRST in names), None)
