"""How much memory a device has, and the error of an allocation that failed."""

from __future__ import annotations

import os
import re

import torch
import torch.distributed as dist

from ..errors import OutOfMemoryError

_ASKED = re.compile(r"(?:[Tt]ried to allocate) ([\d.]+) (bytes|KiB|MiB|GiB)")
# CUDA's own allocations and those of its libraries are not torch's, and fail in words of their own.
CUDA_LACKS = re.compile(r"CUDA error: out of memory|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED")
# NCCL's fail by an error of its own, whose words depend on its version and on NCCL_DEBUG.
_NCCL_LACKS = re.compile(r"out of memory|Cuda failure 2\b|Failed to CUDA (?:m|c)alloc", re.IGNORECASE)
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


def give_back(device: torch.device) -> None:
    """What was freed of a GPU can be had by other programs; on a CPU, where it is faster kept, nothing happens."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def as_out_of_memory(error: BaseException, device: torch.device, rank: int) -> OutOfMemoryError | None:
    """The error of an allocation that failed, of torch or NCCL, with what was asked for and free; None where it is another."""
    text = str(error)
    asked = _ASKED.search(text)
    of_torch = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (asked and "alloc" in text)
    of_nccl = isinstance(error, dist.DistBackendError) and _NCCL_LACKS.search(text)
    if not (of_torch or of_nccl or CUDA_LACKS.search(text)):
        return None
    free, total, _ = memory_of(device)
    wanted = f"{float(asked[1]) * _UNITS[asked[2]] / 2**20:.0f} MiB more" if asked else "More"
    return OutOfMemoryError(
        f"Rank {rank} on {device} is out of memory: {wanted} than it has were asked for, with {free / 2**20:.0f} of "
        f"{total / 2**20:.0f} MiB free.",
        "Use a smaller image or batch; or spread them further: more ulysses or ring ranks (MMDiT), patch ranks (UNet), or, "
        "for the weights, tp or pp (MMDiT) or sliced (UNet).",
    )
