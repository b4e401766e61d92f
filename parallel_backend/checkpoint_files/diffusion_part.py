"""What of a file is the diffusion model, known by its header alone."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from .gguf_file import SUFFIX, gguf_entries
from .packed_entries import packed_entries
from .safetensors_file import PICKLED, files_of, safetensors_header

# In a checkpoint that has text encoders and a VAE beside it.
DIFFUSION_PREFIX = "model.diffusion_model."
# Of SD3 from scratch: no other family has a tensor of this name.
FROM_SCRATCH_MARK = "blocks.0.attn.query_proj_x.weight"


def diffusion_prefix(path: Path) -> str:
    """What stands before the diffusion model's names in the file; empty where it is alone there."""
    if path.suffix == SUFFIX:
        names = [*gguf_entries(path)]
    else:
        names = [name for file in files_of(path) for name in safetensors_header(file)]
    return DIFFUSION_PREFIX if any(name.startswith(DIFFUSION_PREFIX) for name in names) else ""


def diffusion_entries(path: Path, beside: Collection[str] = ()) -> dict[str, Any]:
    """Headers of the diffusion model's tensors, by their names in it, and of those of `beside` that the file has.

    A quantised one has the shape of its values.
    """
    prefix = diffusion_prefix(path)
    if path.suffix == SUFFIX:
        return {
            name.removeprefix(prefix): entry for name, entry in gguf_entries(path).items() if name.startswith(prefix)
        }
    return packed_entries(path, prefix, beside)[0]


def diffusion_bytes(path: Path, itemsize: int) -> int:
    """About what its weights take in a dtype of that many bytes; what is quantised stays so."""
    if path.suffix in PICKLED:
        return path.stat().st_size // 4 * itemsize
    if path.suffix == SUFFIX:
        return path.stat().st_size
    entries, packed = packed_entries(path, diffusion_prefix(path))
    dense = sum(prod(entry["shape"]) for name, entry in entries.items() if name not in packed)
    spans = (entries[name]["data_offsets"] for name in packed)
    return dense * itemsize + sum(stop - start for start, stop in spans)


def is_from_scratch(path: Path) -> bool:
    """Whether it is SD3 from scratch, which comes as a pickle or converted."""
    return path.suffix in PICKLED or FROM_SCRATCH_MARK in diffusion_entries(path)
