"""The few collectives that the methods are made of.

Shapes are known on every rank before a call, so none is negotiated. Along an axis of degree 1 each is the
identity. `start_*` returns a handle; the result of `.wait()` may be read, the tensors sent must live until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .graph_breaks import breaks_graph
from .mesh import MeshAxis
from .traffic import Traffic

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
    keep: tuple[Tensor, ...] = ()
    traffic: Traffic | None = None
    number: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.traffic is not None:
            self.number = self.traffic.collectives  # whoever starts works has just counted them

    def wait(self) -> Tensor:
        if self.works:
            self._arrive()
        return self.result

    @breaks_graph
    def _arrive(self) -> None:
        assert self.traffic is not None, "whoever starts works counts them"
        with self.traffic.waiting(self.result.device, self.number):
            for work in self.works:
                work.wait()
        self.works, self.keep = (), ()


def start_all_reduce(x: Tensor, axis: MeshAxis) -> Handle:
    """Sum of `x` over the axis: `x` itself afterwards where it is contiguous, else a copy. Use the handle's result.

    Comm: ring all-reduce, 2 (degree - 1) / degree * x.numel() elements sent by each rank.
    """
    return Handle(x) if axis.degree == 1 or x.numel() == 0 else _start_all_reduce(x, axis)


@breaks_graph
def _start_all_reduce(x: Tensor, axis: MeshAxis) -> Handle:
    x = x.contiguous()
    axis.traffic.count(2 * (axis.degree - 1) * x.nbytes // axis.degree, "sum")
    return Handle(x, [dist.all_reduce(x, group=axis.group, async_op=True)], traffic=axis.traffic)


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
    full = start_all_gather(sent, axis).wait()
    if any(size != longest for size in sizes):
        full = torch.cat([full[i * longest : i * longest + size] for i, size in enumerate(sizes)])
    return full.movedim(0, dim)


def start_all_gather(x: Tensor, axis: MeshAxis, into: Tensor | None = None) -> Handle:
    """The ranks' tensors, alike in shape, joined along dim 0.

    Args:
        into: where the result is put, contiguous; None is a new tensor.
    Comm: (degree - 1) * x.numel() elements received by each rank.
    """
    if axis.degree == 1:
        return Handle(x)
    x = x.contiguous()
    full = x.new_empty(axis.degree * x.shape[0], *x.shape[1:]) if into is None else into
    if x.is_meta:
        _pay(lambda part: start_all_gather(part, axis), [x], axis)
        return Handle(full)
    axis.traffic.count((axis.degree - 1) * x.nbytes)
    work = _all_gather_flat(full, x, group=axis.group, async_op=True)
    return Handle(full, [work], keep=(x,), traffic=axis.traffic)


def all_to_all(sent_N: Tensor, leaving: Sequence[int], arriving: Sequence[int], axis: MeshAxis) -> Tensor:
    """The first leaving[0] elements go to axis rank 0, and so on; what the ranks sent here lies one after the other.

    Args:
        arriving: elements that each rank sends here.
    Comm: one message, all but what this rank keeps.
    """
    if axis.degree == 1:
        return sent_N
    received = sent_N.new_empty(sum(arriving))
    axis.traffic.count(sent_N.nbytes - leaving[axis.rank] * sent_N.element_size(), "exchange")
    with axis.traffic.waiting(sent_N.device):
        dist.all_to_all_single(received, sent_N, list(arriving), list(leaving), group=axis.group)
    return received


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
    axis.traffic.count(x.nbytes, "ring")
    return Handle(received, dist.batch_isend_irecv(ops), keep=(x,), traffic=axis.traffic)


def start_send(x: Tensor, to: int, axis: MeshAxis) -> Handle:
    """`x` goes to axis rank `to`.

    Comm: x.numel() elements.
    """
    x = x.contiguous()
    axis.traffic.count(x.nbytes, "send", to)
    work = dist.isend(x, axis.global_rank(to), group=axis.group)
    return Handle(x, [work] if work is not None else [], traffic=axis.traffic)


def start_receive(into: Tensor, source: int, axis: MeshAxis) -> Handle:
    """What axis rank `source` sends, in `into`; ranks take messages of one sender in the order that it sent them."""
    axis.traffic.count(0, "receive", source)
    work = dist.irecv(into, axis.global_rank(source), group=axis.group)
    return Handle(into, [work] if work is not None else [], traffic=axis.traffic)


def broadcast(x: Tensor, source: int, axis: MeshAxis) -> Tensor:
    """Axis rank `source`'s tensor on every rank, in place.

    Comm: x.numel() elements to each other rank.
    """
    if axis.degree > 1:
        x = x.contiguous()
        axis.traffic.count((axis.degree - 1) * x.nbytes if axis.rank == source else 0, "broadcast")
        with axis.traffic.waiting(x.device):
            dist.broadcast(x, axis.global_rank(source), group=axis.group)
    return x


def first_says(flag: bool, axis: MeshAxis) -> bool:
    """The flag of the axis's first rank, on every rank.

    Comm: one byte, on the CPU.
    """
    debt = axis.traffic.debt
    if axis.degree == 1 or (debt is not None and debt.is_given()):
        return flag and debt is None
    shared = torch.tensor([flag], dtype=torch.uint8)
    axis.traffic.count(0, "broadcast")
    dist.broadcast(shared, axis.global_rank(0), group=axis.group)
    return bool(shared)


def gather_to_first(
    x: Tensor, dim: int, sizes: Sequence[int], axis: MeshAxis, slots: list[Tensor] | None = None
) -> list[Tensor] | None:
    """The ranks' slices, of these sizes along `dim`, on axis rank 0; None on the others.

    Args:
        slots: as `slots_on_first` makes them.
    Comm: each rank sends its slice, padded to the longest, to axis rank 0.
    """
    if axis.degree == 1:
        return [x]
    longest = max(sizes)
    sent = x.movedim(dim, 0)
    if sent.shape[0] < longest:
        sent = torch.cat([sent, sent.new_zeros(longest - sent.shape[0], *sent.shape[1:])])
    sent = sent.contiguous()
    if slots is None:
        slots = slots_on_first(x, dim, sizes, axis)
    axis.traffic.count(0 if axis.rank == 0 else sent.nbytes)
    dist.gather(sent, slots or None, dst=axis.global_rank(0), group=axis.group)
    return [slot[:size].movedim(0, dim) for slot, size in zip(slots, sizes, strict=True)] if slots else None


def slots_on_first(x: Tensor, dim: int, sizes: Sequence[int], axis: MeshAxis) -> list[Tensor]:
    """Where axis rank 0 takes what `gather_to_first` brings; none on the others."""
    shape = x.movedim(dim, 0).shape[1:]
    return [x.new_empty(max(sizes), *shape) for _ in sizes] if axis.rank == 0 and axis.degree > 1 else []


def _pay(start: Callable[..., Handle], parts: Sequence[Tensor], axis: MeshAxis) -> None:
    """A collective that tensors without values have come to, made with zeros, or passed over where it was made already."""
    debt = axis.traffic.debt
    assert debt is not None, "only who owes computes without values"
    if not debt.is_given():
        start(*(debt.zeros_like(part) for part in parts)).wait()
