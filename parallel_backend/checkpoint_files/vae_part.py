"""What a VAE's files tell by their headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .safetensors_file import safetensors_header

_FIRST = "decoder.conv_in.weight"


def overflows_in_float16(paths: Sequence[Path]) -> bool:
    """Whether it is SDXL's AutoencoderKL, of 4 channels; SD3's has 16, and TAESD comes as two files.

    Raises: CheckpointError: not a safetensors file.
    """
    if len(paths) != 1:
        return False
    entries = safetensors_header(paths[0])
    return any(
        name.endswith(_FIRST) and entry["shape"][1] == 4 for name, entry in entries.items() if name != "__metadata__"
    )
