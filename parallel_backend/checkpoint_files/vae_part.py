"""What of a file is a VAE, and of which kind, known by its names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from .header import entries_of

_FIRST = "decoder.conv_in.weight"
_PREFIXES = ("first_stage_model.", "vae.", "")


def vae_prefix(names: Collection[str]) -> str | None:
    """What stands before the names of an AutoencoderKL's tensors; None where there is none."""
    return next((prefix for prefix in _PREFIXES if prefix + _FIRST in names), None)


def overflows_in_float16(paths: Sequence[Path]) -> bool:
    """Whether it is SDXL's AutoencoderKL, of 4 channels; SD3's has 16, and TAESD comes as two files.

    Raises: CheckpointError: a file that can't be read.
    """
    if len(paths) != 1:
        return False
    entries = entries_of(paths[0])
    prefix = vae_prefix(entries)
    return prefix is not None and entries[prefix + _FIRST]["shape"][1] == 4
