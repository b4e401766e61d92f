"""How much memory a device has, and the error of an allocation that failed."""

from __future__ import annotations

import os
import re

import torch

from ..errors import OutOfMemoryError

_ASKED = re.compile(r"(?:[Tt]ried to allocate) ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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
