"""What of a file is the diffusion model, known by its names alone."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from .bitsandbytes_entries import FOUR_BITS
from .gguf_file import PLAIN, gguf_tensors, is_gguf
from .header import entries_of
from .packed_entries import PackedEntry, has_packing, packed_entries

BARE_FP8, QUANTISED = "bare fp8", "quantised"
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
    return _part(path, beside)[0]


def packing(path: Path) -> str:
    """How its weights are quantised: QUANTISED in any way, BARE_FP8 where that is fp8 without scales alone; else empty."""
    if is_gguf(path):
        return QUANTISED if any(tensor.kind not in PLAIN for tensor in gguf_tensors(path).values()) else ""
    packed = _part(path, ())[1]
    bare = all(entry.form.startswith("float8") and len(entry.parts) == 1 for entry in packed.values())
    return "" if not packed else BARE_FP8 if bare else QUANTISED


def diffusion_bytes(path: Path, itemsize: int) -> int:
    """About what its weights take in a dtype of that many bytes; what is quantised stays so."""
    if is_gguf(path):
        return path.stat().st_size
    entries, packed = _part(path, ())
    dense = sum(prod(entry["shape"]) for name, entry in entries.items() if name not in packed)
    spans = (entries[name]["data_offsets"] for name in packed)
    blocks = sum(prod(e.shape) // e.options["blocksize"] for e in packed.values() if e.form in FOUR_BITS)
    return dense * itemsize + sum(stop - start for start, stop in spans) + 4 * blocks


def _part(path: Path, beside: Collection[str]) -> tuple[dict[str, dict[str, Any]], dict[str, PackedEntry]]:
    """The headers of `diffusion_entries`, and which of them are quantised."""
    entries = entries_of(path)
    prefix = diffusion_prefix(entries)
    if has_packing(path):
        return packed_entries(path, prefix, beside)
    kept = (name for name in entries if name.startswith(prefix) or name in beside)
    return {name.removeprefix(prefix): entries[name] for name in kept}, {}


def is_from_scratch(path: Path) -> bool:
    """Whether it is SD3 from scratch, which comes as a pickle or converted."""
    return FROM_SCRATCH_MARK in diffusion_entries(path)
