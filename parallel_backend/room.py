"""How much memory a rank has, and what to say where it is not enough."""

from __future__ import annotations

import os
import re

import torch

from .config import MeshSpec
from .errors import OutOfMemoryError

_ASKED = re.compile(r"(?:[Tt]ried to allocate) ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# What a process takes of a GPU beside its tensors, and allocations can't be packed without gaps.
_SPARE_BYTES = 256 * 2**20


def memory_of(device: torch.device) -> tuple[int, int, int]:
    """Bytes that a rank could still take, that there are, and that this process has taken."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return free + reserved - torch.cuda.memory_allocated(device), total, reserved
    with open("/proc/meminfo") as lines:
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemAvailable"], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), anonymous_bytes()


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process: what it holds that no file backs."""
    with open(f"/proc/{pid}/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)


def as_out_of_memory(error: BaseException, device: torch.device, rank: int) -> OutOfMemoryError | None:
    """The error of an allocation that failed, with what was asked for and what was free; None where it is another."""
    asked = _ASKED.search(str(error))
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not (asked and "alloc" in str(error)):
        return None
    free, total, _ = memory_of(device)
    wanted = f"{float(asked[1]) * _UNITS[asked[2]] / 2**20:.0f} MiB more" if asked else "More"
    return OutOfMemoryError(
        f"Rank {rank} on {device} is out of memory: {wanted} than it has were asked for, with {free / 2**20:.0f} of "
        f"{total / 2**20:.0f} MiB free.",
        "Use a smaller image or batch; or spread them further: more ulysses or ring ranks (MMDiT), patch ranks (UNet), or "
        "tp or pp for the weights.",
    )


def check_fits(needed: int, free: int, name: str, kind: str, spec: MeshSpec, world_size: int, rank: int) -> None:
    """Raises OutOfMemoryError where `needed` bytes of weights don't fit `free` ones; it names a mesh in which they do.

    Args:
        kind: mmdit, unet or vae: what its weights can be split by.
    """
    if needed + _SPARE_BYTES <= free:
        return
    remedies = {"mmdit": _split_that_fits, "unet": _slices_that_fit}
    remedy = remedies[kind](needed, free, spec, world_size) if kind in remedies else ""
    raise OutOfMemoryError(
        f"{name} needs {needed / 2**20:.0f} MiB on rank {rank}, which has {free / 2**20:.0f} MiB free "
        f"({spec.describe()}).",
        remedy or "No split of its weights over these ranks fits: use a smaller dtype, or more ranks.",
    )


def _split_that_fits(needed: int, free: int, spec: MeshSpec, world_size: int) -> str:
    split = spec.tp * spec.pp
    for degree in (d for d in range(split + 1, world_size + 1) if world_size % d == 0 and d % split == 0):
        if needed * split / degree + _SPARE_BYTES <= free:
            return f"It fits with tp={degree} in Mesh Config, or pp={degree}."
    return ""


def _slices_that_fit(needed: int, free: int, spec: MeshSpec, world_size: int) -> str:
    fits = not spec.sliced and needed / world_size + _SPARE_BYTES <= free
    return "It fits with sliced in Mesh Config." if fits else ""
