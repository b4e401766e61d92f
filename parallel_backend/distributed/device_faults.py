"""What CUDA and NCCL say when they fail, and what helps."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import BackendError
from .device_memory import CUDA_LACKS


@dataclass(frozen=True)
class DeviceFault:
    """Args: lasting: it comes again at every try, with the same ranks and with new ones, until somebody does as `remedy` says."""

    words: re.Pattern[str]
    remedy: str
    lasting: bool = False


class OutOfStep(MemoryError):
    """A rank lacks memory even for what the others wait for: it ends, and all are started anew."""


# torch 2.8 has given CUDA's errors a class of their own.
_OF_DEVICES = (getattr(torch, "AcceleratorError", dist.DistBackendError), dist.DistBackendError)
# A library of CUDA's that doesn't know a shape: what comes after it is as good as what came before.
_HARMLESS = re.compile(r"CU(BLAS|DNN)_STATUS_(NOT_SUPPORTED|INVALID_VALUE)")

FAULTS = (
    DeviceFault(
        re.compile("no kernel image is available"),
        "This torch, or the kernel's package, was not built for this card: install a build for its compute capability, or "
        "choose attention 'native' in Mesh Config.",
        lasting=True,
    ),
    DeviceFault(
        re.compile("CUDA error: operation not supported"),
        "Where the driver has no growing segments (some virtual GPUs), set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False where "
        "ComfyUI or `parallel-mmdit serve` starts, and stop the backend.",
        lasting=True,
    ),
    DeviceFault(
        re.compile("peer access is not supported|peer mapping resources exhausted"),
        "These cards can't copy to each other: set NCCL_P2P_DISABLE=1 where ComfyUI or `parallel-mmdit serve` starts, and stop "
        "the backend.",
    ),
    DeviceFault(
        re.compile("unhandled system error|ncclSystemError"),
        "NCCL lacks something of the system, mostly room in /dev/shm (in a container: --shm-size=1g, or --ipc=host), else a "
        "network interface (NCCL_SOCKET_IFNAME). The backend's log has NCCL's own words.",
    ),
    DeviceFault(
        re.compile("unhandled cuda error|ncclUnhandledCudaError"),
        "NCCL met an error of CUDA. The backend's log has its own words; NCCL_P2P_DISABLE=1 does without copies from card to "
        "card.",
    ),
    DeviceFault(
        re.compile("remote process exited|ncclRemoteError|Connection closed by"),
        "Another rank fell first; the backend's log has its words.",
    ),
)


def known_fault(error: BaseException) -> DeviceFault | None:
    """The first fault whose words the error has."""
    text = str(error)
    return next((fault for fault in FAULTS if fault.words.search(text)), None)


def breaks_rank(error: BaseException) -> bool:
    """Whether a rank can't go on after it, even where all ranks fail alike: its CUDA context or a communicator is lost."""
    text = str(error)
    if isinstance(error, OutOfStep):
        return True
    if isinstance(error, (BackendError, torch.OutOfMemoryError)) or CUDA_LACKS.search(text) or _HARMLESS.search(text):
        return False
    if (fault := known_fault(error)) is not None and fault.lasting:
        return False
    return isinstance(error, _OF_DEVICES) or "CUDA error:" in text
