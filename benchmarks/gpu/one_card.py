"""Several ranks on one GPU, over the real NCCL: each looks like a host of its own, whose only network is loopback.

NCCL refuses two ranks of one host on one card. What it takes for a host is told by NCCL_HOSTID. NVIDIA supports none of
this, and its speed means nothing; the streams, groups and messages are those of real ranks.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_pool import RankPool

from parallel_backend.distributed.links import prove_links
from parallel_backend.rank import lean_imports  # noqa: F401 - ranks of a pool begin with this module

from . import staged

log = logging.getLogger("parallel_backend")

LOOPBACK = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_DEBUG": "WARN",
}
# The first answer comes after a process's start and its imports.
ANSWER_SECONDS, COLLECTIVE_SECONDS = 40.0, 25.0


def as_own_host(rank: int) -> dict[str, str]:
    """What a rank's environment must have before NCCL starts."""
    return LOOPBACK | {"NCCL_HOSTID": f"rank{rank}"}


def join_nccl(rank: int, world_size: int, prove: bool = True) -> None:
    """This process is a rank on GPU 0. Raises: whatever NCCL says; StartError: wrong numbers came.

    Args:
        prove: try the links at once, which makes the first communicator.
    """
    os.environ.update(as_own_host(rank))
    prepare("cuda")
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=world_size, timeout=limit)
    if prove:
        prove_links(torch.device("cuda", 0), log.info)


def join_staged(device: str, rank: int, world_size: int) -> None:
    """This process is a rank on GPU 0, or on the CPU; all that ranks send each other goes through gloo and the CPU."""
    os.environ.update(LOOPBACK)
    prepare(device)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    staged.install()


def prepare(device: str) -> None:
    """Numbers of this process are comparable: convolutions in fp32, not TF32."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    if device == "cuda":
        torch.cuda.set_device(0)


def nothing() -> None:
    """For ranks that are only to be there."""


@dataclass(frozen=True)
class Ranks:
    """Started ranks, and in words what they talk over."""

    pool: RankPool
    over: str
    nccl: bool


def ranks_on_one_card(device: str, world_size: int, try_nccl: bool = True) -> Ranks:
    """Ranks on GPU 0 over NCCL; where it refuses, or is not to be tried, over gloo behind copies to the CPU."""
    if device == "cpu":
        return Ranks(RankPool(partial(join_staged, device), seconds=60), "gloo on the CPU", False)
    why = "NCCL has refused before"
    spawn = mp.get_context("spawn")  # not forked: libraries may have touched the driver before
    if try_nccl:
        pool = RankPool(join_nccl, spawn, ANSWER_SECONDS)
        try:
            pool(world_size, nothing)
        except AssertionError as refused:
            why = f"NCCL refuses: {last_line(refused)}"
        else:
            return Ranks(pool, "NCCL, each rank as a host of its own (NCCL_HOSTID)", True)
    pool = RankPool(partial(join_staged, device), spawn, ANSWER_SECONDS)
    pool(world_size, nothing)
    return Ranks(pool, f"gloo, tensors copied to the CPU and back, since {why}", False)


def last_line(error: BaseException) -> str:
    """Of a rank's trace: the error itself."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:250]
