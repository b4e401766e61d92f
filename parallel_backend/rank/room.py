"""Whether a model fits a rank, and what to say where it doesn't."""

from __future__ import annotations

from ..config import MeshSpec
from ..errors import OutOfMemoryError


def spare_bytes(needed: float, device_type: str) -> float:
    """What is kept free beside weights: allocations leave gaps; on a GPU, libraries take their workspaces besides."""
    return max(512 * 2**20, 0.03 * needed) if device_type == "cuda" else 256 * 2**20


def fits(needed: float, free: int, device_type: str) -> bool:
    """Whether so many bytes of weights have room in `free` ones: who lets models go and who refuses ask this alike."""
    return needed + spare_bytes(needed, device_type) <= free


def check_fits(
    needed: int, free: int, device_type: str, name: str, kind: str, spec: MeshSpec, world_size: int, rank: int
) -> None:
    """Raises OutOfMemoryError where `needed` bytes of weights don't fit `free` ones; it names a mesh in which they do.

    Args:
        device_type: cuda or cpu.
        kind: mmdit, unet or vae: what its weights can be split by.
    """
    if fits(needed, free, device_type):
        return
    remedies = {"mmdit": _split_that_fits, "unet": _slices_that_fit}
    remedy = remedies[kind](needed, free, device_type, spec, world_size) if kind in remedies else ""
    raise OutOfMemoryError(
        f"{name} needs {needed / 2**20:.0f} MiB on rank {rank}, which has {free / 2**20:.0f} MiB free and keeps "
        f"{spare_bytes(needed, device_type) / 2**20:.0f} in reserve ({spec.describe()}).",
        remedy or "No split of its weights over these ranks fits: use a smaller dtype, or more ranks.",
    )


def _split_that_fits(needed: int, free: int, device_type: str, spec: MeshSpec, world_size: int) -> str:
    split = spec.tp * spec.pp
    for degree in (d for d in range(split + 1, world_size + 1) if world_size % d == 0 and d % split == 0):
        if fits(needed * split / degree, free, device_type):
            return f"It fits with tp={degree} in Mesh Config, or pp={degree}."
    return ""


def _slices_that_fit(needed: int, free: int, device_type: str, spec: MeshSpec, world_size: int) -> str:
    enough = not spec.sliced and fits(needed / world_size, free, device_type)
    return "It fits with sliced in Mesh Config." if enough else ""
