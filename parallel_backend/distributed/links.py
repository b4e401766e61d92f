"""Whether ranks hear each other, tried before anybody waits for a picture."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StartError
from .collectives import Handle, start_all_reduce, start_ring_exchange
from .mesh import MeshAxis

log = logging.getLogger("parallel_backend")

_ELEMENTS = 2**18  # of 4 bytes
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
