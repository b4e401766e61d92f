"""Batches from loader ranks to the model ranks that they feed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from .config import Roles
from .data import Batch, Source

# Images and hints have four dimensions, words two.
HEADER = 10


def feed(source: Source, fed: list[int], first: int, last: int) -> None:
    """Sends batches `first` to `last` of the source: each rank of `fed` in turn, one ahead of what it has taken.

    Comm: a header of 10 integers and the three tensors of each batch, to one rank.
    """
    under_way: dict[int, list[dist.Work | None]] = {rank: [] for rank in fed}
    kept: dict[int, list[torch.Tensor]] = {}
    for number in range(first, last):
        for place, rank in enumerate(fed):
            batch = source.batch(number * len(fed) + place)
            for work in filter(None, under_way[rank]):
                work.wait()
            tensors = batch.images, batch.hints, batch.words
            header = torch.tensor([side for tensor in tensors for side in tensor.shape])
            kept[rank] = [header, *(tensor.contiguous() for tensor in tensors)]
            under_way[rank] = [dist.isend(tensor, rank) for tensor in kept[rank]]
    for work in (work for works in under_way.values() for work in works if work is not None):
        work.wait()


def batches(source: Source | None, roles: Roles, rank: int, first: int, last: int) -> Iterator[Batch]:
    """The batches that a model rank trains on: its own source's, or those of its loader rank."""
    for number in range(first, last):
        if source is not None:
            yield source.batch(number)
        else:
            loader = roles.loader_of(rank)
            header = torch.empty(HEADER, dtype=torch.int64)
            dist.recv(header, loader)
            images, hints = torch.empty(header[:4].tolist()), torch.empty(header[4:8].tolist())
            words = torch.empty(header[8:].tolist(), dtype=torch.int64)
            for tensor in (images, hints, words):
                dist.recv(tensor, loader)
            yield Batch(images, words, hints)
