"""What of a file is the diffusion model, known by its header alone."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from .safetensors_file import PICKLED, files_of, safetensors_header

# In a checkpoint that has text encoders and a VAE beside it.
DIFFUSION_PREFIX = "model.diffusion_model."
# Of SD3 from scratch: no other family has a tensor of this name.
FROM_SCRATCH_MARK = "blocks.0.attn.query_proj_x.weight"


def diffusion_entries(path: Path, beside: Collection[str] = ()) -> dict[str, Any]:
    """Headers of the diffusion model's tensors, by their names in it, and of those of `beside` that the file has."""
    entries = {
        name: entry
        for file in files_of(path)
        for name, entry in safetensors_header(file).items()
        if name != "__metadata__"
    }
    if any(name.startswith(DIFFUSION_PREFIX) for name in entries):
        kept = (name for name in entries if name.startswith(DIFFUSION_PREFIX) or name in beside)
        entries = {name.removeprefix(DIFFUSION_PREFIX): entries[name] for name in kept}
    return entries


def diffusion_elements(path: Path) -> int:
    """How many numbers it holds; a pickle, which has no header, holds fp32."""
    if path.suffix in PICKLED:
        return path.stat().st_size // 4
    return sum(prod(entry["shape"]) for entry in diffusion_entries(path).values())


def is_from_scratch(path: Path) -> bool:
    """Whether it is SD3 from scratch, which comes as a pickle or converted."""
    return path.suffix in PICKLED or FROM_SCRATCH_MARK in diffusion_entries(path)
