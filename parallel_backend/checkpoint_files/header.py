"""Names, shapes and dtypes of a checkpoint's tensors, whatever kind of file holds them. Reads no weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .gguf_file import gguf_entries, is_gguf
from .layout import files_of
from .pickled_file import is_pickled, pickled_tensors
from .safetensors_file import safetensors_header

# Safetensors' words for the dtypes that are read.
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def file_entries(file: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors header says of each tensor: at least `dtype` ("F16") and `shape`.

    Raises: CheckpointError: as the kind's own reader.
    """
    if is_gguf(file):
        return gguf_entries(file)
    if is_pickled(file):
        meta = pickled_tensors(file, "meta")
        return {
            name: {
                "dtype": CODES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
                "shape": list(tensor.shape),
            }
            for name, tensor in meta.items()
        }
    return {name: entry for name, entry in safetensors_header(file).items() if name != "__metadata__"}


def entries_of(path: Path) -> dict[str, dict[str, Any]]:
    """As `file_entries`, of all files of the model at `path`."""
    return {name: entry for file in files_of(path) for name, entry in file_entries(file).items()}
