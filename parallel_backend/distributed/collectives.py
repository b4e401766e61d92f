"""The few collectives that the methods are made of.

Shapes are known on every rank before a call, so none is negotiated. Along an axis of degree 1 each is the
identity. `start_*` returns a handle; the result of `.wait()` may be read, the tensors sent must live until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import MeshAxis

# torch 2.13 renamed it; older ones have only the first name.
_all_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most 1, larger ones first."""
    base, more = divmod(total, parts)
    return [base + (i < more) for i in range(parts)]


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """First and one-past-last position of part `index` of `split_sizes`."""
    sizes = split_sizes(total, parts)
    start = sum(sizes[:index])
    return start, start + sizes[index]


@dataclass
class Handle:
    """A collective under way; `.wait()` returns its result."""

    result: Tensor
    works: Sequence[dist.Work] = ()
    keep: tuple[Tensor, ...] = field(default=())

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.works, self.keep = (), ()
        return self.result


def start_all_reduce(x: Tensor, axis: MeshAxis) -> Handle:
    """Sum of `x` over the axis, in place.

    Comm: ring all-reduce, 2 (degree - 1) / degree * x.numel() elements sent by each rank.
    """
    if axis.degree == 1 or x.numel() == 0:
        return Handle(x)
    x = x.contiguous()
    return Handle(x, [dist.all_reduce(x, group=axis.group, async_op=True)])


def all_gather(x: Tensor, dim: int, sizes: Sequence[int], axis: MeshAxis) -> Tensor:
    """The ranks' slices joined along `dim`; `sizes[i]` is the length of the slice of axis rank i.

    Unequal slices travel padded to the longest, and the padding is cut off again.
    Comm: (degree - 1) * max(sizes) / sizes[rank] * x.numel() elements received by each rank.
    """
    if axis.degree == 1:
        return x
    longest = max(sizes)
    sent = x.movedim(dim, 0)
    if sent.shape[0] < longest:
        sent = torch.cat([sent, sent.new_zeros(longest - sent.shape[0], *sent.shape[1:])])
    full = sent.new_empty(axis.degree * longest, *sent.shape[1:])
    _all_gather_flat(full, sent.contiguous(), group=axis.group)
    if any(size != longest for size in sizes):
        full = torch.cat([full[i * longest : i * longest + size] for i, size in enumerate(sizes)])
    return full.movedim(0, dim)


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[torch.Size | tuple[int, ...]], axis: MeshAxis) -> list[Tensor]:
    """`parts[i]` goes to axis rank i; what rank i sent here comes back in place i, of shape `shapes[i]`.

    Comm: one message, all parts but this rank's own.
    """
    if axis.degree == 1:
        return list(parts)
    sent = torch.cat([part.reshape(-1) for part in parts])
    numels = [torch.Size(shape).numel() for shape in shapes]
    received = sent.new_empty(sum(numels))
    dist.all_to_all_single(received, sent, numels, [part.numel() for part in parts], group=axis.group)
    return [flat.view(shape) for flat, shape in zip(received.split(numels), shapes, strict=True)]


def start_ring_exchange(x: Tensor, received_shape: Sequence[int], axis: MeshAxis) -> Handle:
    """`x` goes to the next rank of the axis, and the previous rank's tensor comes.

    Comm: x.numel() elements to one neighbour.
    """
    x = x.contiguous()
    received = x.new_empty(received_shape)
    following, previous = (axis.global_rank((axis.rank + turn) % axis.degree) for turn in (1, -1))
    ops = [
        dist.P2POp(dist.isend, x, following, group=axis.group),
        dist.P2POp(dist.irecv, received, previous, group=axis.group),
    ]
    return Handle(received, dist.batch_isend_irecv(ops), keep=(x,))


def exchange_halo(x_BCYX: Tensor, above: int, below: int, axis: MeshAxis) -> Tensor:
    """The band with `above` rows of the band above it and `below` rows of the band below; outer edges are zeros.

    Every band has at least max(above, below) rows: the caller sees to it.
    Comm: above rows to the rank below and below rows to the rank above, B * C * X elements a row.
    """
    B, C, _, X = x_BCYX.shape
    top, bottom = x_BCYX.new_zeros(B, C, above, X), x_BCYX.new_zeros(B, C, below, X)
    ops, keep = [], []
    if axis.rank > 0:
        if below:
            keep.append(x_BCYX[:, :, :below].contiguous())
            ops.append(dist.P2POp(dist.isend, keep[-1], axis.global_rank(axis.rank - 1), group=axis.group))
        if above:
            ops.append(dist.P2POp(dist.irecv, top, axis.global_rank(axis.rank - 1), group=axis.group))
    if axis.rank < axis.degree - 1:
        if above:
            keep.append(x_BCYX[:, :, -above:].contiguous())
            ops.append(dist.P2POp(dist.isend, keep[-1], axis.global_rank(axis.rank + 1), group=axis.group))
        if below:
            ops.append(dist.P2POp(dist.irecv, bottom, axis.global_rank(axis.rank + 1), group=axis.group))
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    return torch.cat([top, x_BCYX, bottom], dim=2) if above or below else x_BCYX


def gather_to_first(x: Tensor, dim: int, sizes: Sequence[int], axis: MeshAxis) -> Tensor | None:
    """The ranks' slices joined along `dim` on axis rank 0; None on the others.

    Comm: each rank sends its slice, padded to the longest, to axis rank 0.
    """
    if axis.degree == 1:
        return x
    longest = max(sizes)
    sent = x.movedim(dim, 0)
    if sent.shape[0] < longest:
        sent = torch.cat([sent, sent.new_zeros(longest - sent.shape[0], *sent.shape[1:])])
    sent = sent.contiguous()
    slots = [torch.empty_like(sent) for _ in sizes] if axis.rank == 0 else None
    dist.gather(sent, slots, dst=axis.global_rank(0), group=axis.group)
    if slots is None:
        return None
    return torch.cat([slot[:size] for slot, size in zip(slots, sizes, strict=True)]).movedim(0, dim)
