"""Where this rank runs: its device, and who shares it."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from ..distributed.device_memory import memory_of
from ..distributed.shared_cores import never_preempt
from ..rpc import runtime_dir as files
from ..rpc.state import RankState

# RDNA 2 and older, and GCN. Source: ComfyUI, model_management.should_use_bf16, which names most of them one by one.
_AMD_WITHOUT_BFLOAT16 = ("gfx8", "gfx900", "gfx906", "gfx10")


def own_device(kind: str, ordinals: str) -> tuple[torch.device, int]:
    """This rank's device, made this process's own, and how many ranks share its memory.

    Args:
        ordinals: of the ranks' GPUs on this host, in order, with commas; empty is 0, 1, ...
    """
    local, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if kind == "cpu":
        never_preempt()
        return torch.device("cpu"), ranks_here
    devices = [int(d) for d in ordinals.split(",")] if ordinals else list(range(ranks_here))
    device = torch.device("cuda", devices[local])
    torch.cuda.set_device(device)
    return device, devices.count(devices[local])


def rank_state(device: torch.device, rank: int) -> RankState:
    """Where this rank runs and how much memory its device has."""
    free, total, used = memory_of(device)
    cuda = device.type == "cuda"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if cuda else f"{threads} thread{'s' * (threads != 1)}"
    card = torch.cuda.get_device_properties(device) if cuda else None
    known = (
        (str(getattr(card, "uuid", "")), (card.major, card.minor), has_bfloat16(card)) if card else ("", (0, 0), True)
    )
    place = (rank, socket.gethostname(), files.machine(), os.getpid(), str(device), name)
    return RankState(*place, free, total, used, *known)


def has_bfloat16(card: Any) -> bool:
    """Of a GPU's properties; CUDA's capability tells it otherwise."""
    return not (torch.version.hip and card.gcnArchName.startswith(_AMD_WITHOUT_BFLOAT16))
