"""What collectives.py calls of torch.distributed, through the CPU: for ranks on one GPU where NCCL takes none of it.

Each rank calls the same collectives in the same order, so those that aren't messages are over when they return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel_backend.distributed import collectives

Group = dist.ProcessGroup | None


@dataclass
class Done:
    """Work that is over, but for bringing what came to where it was wanted."""

    arrive: Callable[[], object] = lambda: None

    def wait(self) -> None:
        self.arrive()


@dataclass
class Message:
    op: Callable[..., Done]
    tensor: Tensor
    peer: int
    group: Group = None


class Staged:
    """torch.distributed as collectives.py sees it; what isn't here is torch's own."""

    P2POp = Message

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, x: Tensor, group: Group = None, async_op: bool = False) -> Done:
        host = x.cpu()
        dist.all_reduce(host, group=group)
        x.copy_(host)
        return Done()

    def all_gather_flat(self, full: Tensor, x: Tensor, group: Group = None, async_op: bool = False) -> Done:
        host = _like(full)
        dist.all_gather_into_tensor(host, x.cpu(), group=group)
        full.copy_(host)
        return Done()

    def all_to_all_single(
        self, received: Tensor, sent: Tensor, arriving: list[int], leaving: list[int], group: Group = None
    ) -> None:
        host = _like(received)
        dist.all_to_all_single(host, sent.cpu(), arriving, leaving, group=group)
        received.copy_(host)

    def broadcast(self, x: Tensor, source: int, group: Group = None) -> None:
        host = x.cpu()
        dist.broadcast(host, source, group=group)
        x.copy_(host)

    def gather(self, sent: Tensor, slots: list[Tensor] | None, dst: int, group: Group = None) -> None:
        hosts = None if slots is None else [_like(slot) for slot in slots]
        dist.gather(sent.cpu(), hosts, dst=dst, group=group)
        for slot, host in zip(slots or [], hosts or [], strict=True):
            slot.copy_(host)

    def isend(self, x: Tensor, to: int, group: Group = None) -> Done:
        host = x.cpu()
        work = dist.isend(host, to, group=group)
        return Done(lambda: (work.wait(), host))  # the copy lives until then

    def irecv(self, into: Tensor, source: int, group: Group = None) -> Done:
        host = _like(into)
        work = dist.irecv(host, source, group=group)
        return Done(lambda: (work.wait(), into.copy_(host)))

    def batch_isend_irecv(self, ops: Sequence[Message]) -> list[Done]:
        return [message.op(message.tensor, message.peer, group=message.group) for message in ops]


def install() -> None:
    """From now on this process's collectives go through the CPU."""
    collectives.dist = Staged()  # type: ignore[assignment]
    collectives._all_gather_flat = collectives.dist.all_gather_flat


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)
