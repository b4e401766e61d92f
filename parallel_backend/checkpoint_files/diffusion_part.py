"""What of a file is the diffusion model, known by its names alone."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from .gguf_file import is_gguf
from .header import entries_of
from .packed_entries import has_packing, packed_entries

# What may stand before the model's names: in a full checkpoint, in files of other trainers, in those of a distributed run.
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "module.", "model.")
# Of SD3 from scratch: no other family has a tensor of this name.
FROM_SCRATCH_MARK = "blocks.0.attn.query_proj_x.weight"
# With one of these begins the name of some tensor of each model that can be told, ours or not.
_MARKS = (
    *("joint_blocks.", "transformer_blocks.", "input_blocks.", "down_blocks.", "double_blocks."),
    FROM_SCRATCH_MARK,
)


def diffusion_prefix(names: Collection[str]) -> str:
    """What stands before the names of the diffusion model's tensors; all others belong to something else."""
    for prefix in _PREFIXES:
        marks = tuple(prefix + mark for mark in _MARKS)
        if any(name.startswith(marks) for name in names):
            return prefix
    return ""


def diffusion_entries(path: Path, beside: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Headers of the diffusion model's tensors, by their names in it, and of those of `beside` that the file has.

    A quantised one has the shape of its values.
    """
    entries = entries_of(path)
    prefix = diffusion_prefix(entries)
    if has_packing(path):
        return packed_entries(path, prefix, beside)[0]
    return {
        name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix) or name in beside
    }


def diffusion_bytes(path: Path, itemsize: int) -> int:
    """About what its weights take in a dtype of that many bytes; what is quantised stays so."""
    if is_gguf(path):
        return path.stat().st_size
    packed = packed_entries(path, diffusion_prefix(entries_of(path)))[1] if has_packing(path) else {}
    entries = diffusion_entries(path)
    dense = sum(prod(entry["shape"]) for name, entry in entries.items() if name not in packed)
    spans = (entries[name]["data_offsets"] for name in packed)
    return dense * itemsize + sum(stop - start for start, stop in spans)


def is_from_scratch(path: Path) -> bool:
    """Whether it is SD3 from scratch, which comes as a pickle or converted."""
    return FROM_SCRATCH_MARK in diffusion_entries(path)
