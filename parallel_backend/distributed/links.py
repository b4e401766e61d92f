"""Whether ranks hear each other, tried before anybody waits for a picture."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StartError
from .collectives import (
    Handle,
    all_to_all,
    broadcast,
    split_sizes,
    start_all_gather,
    start_all_reduce,
    start_receive,
    start_ring_exchange,
    start_send,
)
from .journal import Kind
from .mesh import MeshAxis

log = logging.getLogger("parallel_backend")

_ELEMENTS = 2**18  # of 4 bytes
# Elements that each rank has of a message that is measured, the least and the most; how often each is.
MEASURED_ELEMENTS, _REPEATS = (2**8, 2**20), 9
REMEDY = (
    "On GPUs the usual causes are copies from card to card that never arrive (NCCL_P2P_DISABLE=1 does without; in the BIOS, "
    "IOMMU and ACS off let them), a small /dev/shm (in a container: --shm-size=1g) and a network interface that is not the "
    "one between the hosts, or a firewall (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; serve --interface)."
)


def prove_links(device: torch.device, trying: Callable[[str], None]) -> None:
    """Every rank has got right numbers from all others at once, and from its neighbour in a ring.

    Args:
        trying: told what is tried next, for whoever watches the clock: a link that is broken may be silent for ever.
    Raises: StartError: other numbers came than were sent.
    Comm: twice, an all-reduce of 1 MiB over the world and 1 MiB to the next rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return
    axis = MeshAxis("world", world, rank, dist.group.WORLD)
    sends: tuple[tuple[str, Callable[[Tensor], Handle], float], ...] = (
        ("an all-reduce over all ranks", lambda x: start_all_reduce(x, axis), world * (world + 1) / 2),
        (
            "a message from each rank to the next",
            lambda x: start_ring_exchange(x, x.shape, axis),
            (rank - 1) % world + 1,
        ),
    )
    for what, send, expected in sends:
        trying(what)
        for _ in range(2):  # the first one opens the connections, the second has a speed
            start = time.perf_counter()
            received = send(torch.full((_ELEMENTS,), rank + 1.0, device=device)).wait()
            wrong = int(torch.count_nonzero(received != expected))
            seconds = time.perf_counter() - start
        if wrong:
            raise StartError(
                f"Rank {rank} on {device} got {wrong} wrong numbers of {_ELEMENTS} from {what}: the links between the ranks "
                "change what they carry.",
                REMEDY,
            )
        log.info("%s, 1 MiB: %.1f ms, %.2f GB/s", what, seconds * 1000, received.nbytes / seconds / 1e9)


class LinkTime(NamedTuple):
    """Seconds of one message of a kind, the median of several; `nbytes` are those that a rank sends, as `Traffic` counts."""

    kind: Kind
    nbytes: int
    seconds: float


def measure_links(device: torch.device) -> list[LinkTime]:
    """How long messages of each kind take between all ranks of the world, while none of them computes.

    Returns: of each kind one with few bytes and one with many, this rank's view.
    Comm: all kinds of messages, each `_REPEATS` times and once more.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return []
    axis = MeshAxis("world", world, rank, dist.group.WORLD)
    return [
        _timed(kind, send, torch.ones(elements, device=device), axis)
        for kind, send in _SENDS.items()
        for elements in MEASURED_ELEMENTS
    ]


def _timed(kind: Kind, send: Callable[[Tensor, MeshAxis], object], x: Tensor, axis: MeshAxis) -> LinkTime:
    found, before = [], axis.traffic.sent_bytes
    for _ in range(_REPEATS + 1):  # the first one opens connections
        start_all_reduce(x.new_ones(1), axis).wait()
        _finish(x.device)
        before, start = axis.traffic.sent_bytes, time.perf_counter()
        send(x, axis)
        _finish(x.device)
        found.append(time.perf_counter() - start)
    sent = axis.traffic.sent_bytes - before
    return LinkTime(kind, sent or x.nbytes, statistics.median(found[1:]))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _exchange(x: Tensor, axis: MeshAxis) -> object:
    """Like a rank's heads or tokens: an equal part to each."""
    sizes = split_sizes(x.numel(), axis.degree)
    return all_to_all(x, sizes, [sizes[axis.rank]] * axis.degree, axis)


def _hand_down(x: Tensor, axis: MeshAxis) -> object:
    """From the first rank to the second, as a stage to the next; the others look on."""
    if axis.rank > 1:
        return None
    return (start_send(x, 1, axis) if axis.rank == 0 else start_receive(torch.empty_like(x), 0, axis)).wait()


_SENDS: Mapping[Kind, Callable[[Tensor, MeshAxis], object]] = {
    "gather": lambda x, axis: start_all_gather(x, axis).wait(),
    "sum": lambda x, axis: start_all_reduce(x.clone(), axis).wait(),
    "exchange": _exchange,
    "broadcast": lambda x, axis: broadcast(x, 0, axis),
    "ring": lambda x, axis: start_ring_exchange(x, x.shape, axis).wait(),
    "send": _hand_down,
}
