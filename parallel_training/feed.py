"""Batches from loader ranks to the model ranks that they feed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from .config import Roles
from .data import Batch, Source

HEADER = 6


def feed(source: Source, fed: list[int], first: int, last: int) -> None:
    """Sends batches `first` to `last` of the source: each rank of `fed` in turn, one ahead of what it has taken.

    Comm: a header of 6 integers and the two tensors of each batch, to one rank.
    """
    under_way: dict[int, list[dist.Work | None]] = {rank: [] for rank in fed}
    kept: dict[int, list[torch.Tensor]] = {}
    for number in range(first, last):
        for place, rank in enumerate(fed):
            batch = source.batch(number * len(fed) + place)
            for work in filter(None, under_way[rank]):
                work.wait()
            header = torch.tensor([*batch.images.shape, *batch.words.shape])
            kept[rank] = [header, batch.images.contiguous(), batch.words.contiguous()]
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
            images, words = torch.empty(header[:4].tolist()), torch.empty(header[4:].tolist(), dtype=torch.int64)
            dist.recv(images, loader)
            dist.recv(words, loader)
            yield Batch(images, words)
