"""How ranks meet, under a clock: a link that is broken is often silent, and would leave a person waiting for ever."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..distributed.control import Control
from ..distributed.links import REMEDY, prove_links
from ..distributed.mesh import COLLECTIVE_TIMEOUT
from ..errors import StartError
from ..rpc.runtime_dir import STAGES

log = logging.getLogger("parallel_backend")

# From the first rank's arrival to the last one's: each has imported torch by then, one after the other on a slow disk.
ARRIVE_SECONDS = 150.0
MEET_SECONDS = 60.0


def restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def meet(
    device: torch.device, give_up: Callable[[StartError], object], note: Callable[[str], object] = lambda stage: None
) -> Control:
    """This rank's line to all others that torchrun started this time; every rank has heard every other.

    Args:
        give_up: told from another thread that the time is over; it must end the process.
        note: told each stage of the runtime folder's STAGES as it begins.
    Raises: StartError: a rank never came, or numbers arrive wrong.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    note(STAGES[0])
    store = _own_store(rank, world)
    _await_all(store, rank, world)
    step = "the connections of all ranks"

    def trying(what: str) -> None:
        nonlocal step
        step = what

    def late() -> None:
        what = f"Rank {rank} on {device} has waited {MEET_SECONDS:.0f} s for {step}: the ranks don't reach each other."
        give_up(StartError(what, REMEDY))

    note(STAGES[1])
    with _clock(MEET_SECONDS, late):
        # No device_id: with it, NCCL would put messages between two ranks on their group's one communicator, where they
        # wait for each other.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=COLLECTIVE_TIMEOUT,
        )
        control = Control(store, device)
        note(STAGES[2])
        prove_links(device, trying)
    note(STAGES[3])
    return control


def _own_store(rank: int, world: int) -> dist.Store:
    """torchrun's store lives through restarts, and what ranks of an earlier start left there would be taken for this
    one's addresses: so each start has names of its own.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, world, is_master=not agents and rank == 0)
    return dist.PrefixStore(f"start-{restart_count()}", store)


def _await_all(store: dist.Store, rank: int, world: int) -> None:
    keys = [f"arrived/{other}" for other in range(world)]
    store.set(keys[rank], "1")
    try:
        store.wait(keys, timedelta(seconds=ARRIVE_SECONDS))
    except RuntimeError as error:
        absent = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
        raise StartError(
            f"Rank {rank} has waited {ARRIVE_SECONDS:.0f} s for rank {absent}, which never came.",
            "Its own log, rankN.log beside the backend's, has what it did last.",
        ) from error


@contextmanager
def _clock(seconds: float, late: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
