"""Started this step, read the next step: what the other ranks of an axis had one evaluation ago.

Source: DistriFusion (Li et al. 2024, arXiv 2402.19481), section 4. A network has hundreds of small tensors to share;
they travel as a few large messages, while the rest of this evaluation and the start of the next are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .collectives import Handle, start_all_gather
from .mesh import MeshAxis
from .traffic import Timeline

# Large enough that a message's start costs nothing beside it, small enough that most of a step's are under way early.
BUCKET_BYTES = 8 * 2**20
ALIGNED = 16

Phase = Literal["sync", "displaced"]


@dataclass
class Kept:
    """What one job keeps from evaluation to evaluation; it dies with the job.

    `begun` are the uses of ControlNets that have been evaluated. `stale` and `token_kv` are there only in jobs that have displaced steps: the first where ranks share what they have
    by messages, the second where patches of `num_patches` flow through a pipeline. `timeline` is there where the job is to be told of in detail.
    """

    stale: StaleExchange | None = None
    token_kv: dict[Hashable, TokenKV] | None = None
    num_patches: int = 1
    begun: set[Hashable] = field(default_factory=set)
    timeline: Timeline | None = None

    def nbytes(self) -> int:
        """Of all that is kept now."""
        kv = self.token_kv.values() if self.token_kv is not None else ()
        stale = self.stale.nbytes() if self.stale is not None else 0
        return stale + sum(tokens.nbytes() for tokens in kv)

    def close(self) -> None:
        """Waits for all that is under way, so that the next job finds the lines free."""
        if self.stale is not None:
            self.stale.close()


@dataclass(frozen=True)
class Step:
    """Which evaluation of a job this is. `branch` tells apart calls that one step makes: for cond and for uncond, of ControlNets.

    `sigma` is the noise's, as on the CPU; None outside of a sampling.
    """

    index: int = 0
    phase: Phase = "sync"
    branch: Hashable = 0
    kept: Kept | None = None
    sigma: float | None = None

    @property
    def stale(self) -> StaleExchange | None:
        return self.kept.stale if self.kept is not None else None


EXACT = Step()


class TokenKV:
    """Keys and values of all tokens of one attention, each as fresh as its segment came last.

    Source: PipeFusion (Fang et al. 2024, arXiv 2405.14430), section 3.
    Shapes: B rows, L tokens of this ring rank, N heads, H head dim.
    """

    def __init__(self, segments: Sequence[Sequence[int]]) -> None:
        """`segments`: tokens of each segment by ulysses rank."""
        self._segments = segments
        self._starts = [sum(map(sum, segments[:i])) for i in range(len(segments) + 1)]
        self._full: Tensor | None = None

    def update(self, k_BLNH: Tensor, v_BLNH: Tensor, present: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All keys and values, those given put in their places.

        Args:
            k_BLNH, v_BLNH: one ulysses rank's tokens after the other's, each in the order of `present`.
            present: which segments they are of; the first time, all.
        """
        if self._full is None:
            assert len(present) == sum(any(counts) for counts in self._segments), (
                "the first evaluation is of all tokens"
            )
            self._full = k_BLNH.new_empty(2, k_BLNH.shape[0], self._starts[-1], *k_BLNH.shape[2:])
        at = list(self._starts)
        degree = len(self._segments[0])
        lengths = [self._segments[s][rank] for rank in range(degree) for s in present]
        for index, fresh in enumerate(zip(k_BLNH.split(lengths, dim=1), v_BLNH.split(lengths, dim=1), strict=True)):
            segment = present[index % len(present)]
            for kept, part in zip(self._full, fresh, strict=True):
                kept[:, at[segment] : at[segment] + part.shape[1]] = part
            at[segment] += lengths[index]
        return self._full[0], self._full[1]

    def nbytes(self) -> int:
        return self._full.nbytes if self._full is not None else 0


class StaleExchange:
    """Messages of all ranks of an axis, by slot: those of the evaluation before this one.

    Every rank uses the same slots in the same order, and calls `end_evaluation` after each evaluation. What is sent and
    what has come lie in buckets, at the same addresses from the first displaced evaluation to the last of a job.
    """

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis
        self._exact: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, _Place] = {}
        self._open: _Bucket | None = None

    def keep(self, slot: Hashable, gathered_RN: Tensor) -> None:
        """In a synchronous evaluation: what came fresh is what the next evaluation reads."""
        self._exact[slot] = gathered_RN

    def swap(self, slot: Hashable, write: Callable[[Tensor], object]) -> Tensor:
        """Every rank's message (R, N) of the last evaluation, to be read before this one ends.

        Args:
            write: puts this rank's message (N,) in the tensor that it is given, from where it is sent for the next evaluation.
        Comm: later, in a bucket: (degree - 1) * N elements.
        """
        if slot in self._exact:
            self._settle()
        place = self._places[slot]
        if self._open is not place.bucket:
            self._send()
            self._open = place.bucket
            place.bucket.arrive()
        write(place.own())
        return place.all()

    def joined(self, slot: Hashable, own: Tensor, dim: int, counts: Sequence[int], phase: Phase) -> Tensor:
        """Every rank's tensor along `dim`: in sync all fresh, in displaced steps the others' of the last evaluation.

        Args:
            counts: each rank's length of `dim`.
        Comm: one all-gather, or as `swap`; of the longest rank's length.
        """
        shapes = [(*own.shape[:dim], count, *own.shape[dim + 1 :]) for count in counts]
        if phase == "sync":
            message = own.new_empty(1, prod(shapes[0]) // max(1, counts[0]) * max(counts))
            message[0, : own.numel()].view(own.shape).copy_(own)
            gathered = start_all_gather(message, self.axis).wait()
            self.keep(slot, gathered)
        else:
            gathered = self.swap(slot, lambda sent: sent[: own.numel()].view(own.shape).copy_(own))
        parts = [row[: prod(shape)].view(shape) for row, shape in zip(gathered, shapes, strict=True)]
        parts[self.axis.rank] = own
        return torch.cat(parts, dim=dim)

    def end_evaluation(self) -> None:
        """What is still to be sent goes on its way."""
        self._send()

    def nbytes(self) -> int:
        """Of the messages that the next evaluation reads, and of those on their way."""
        buckets = {id(place.bucket): place.bucket for place in self._places.values()}
        return sum(kept.nbytes for kept in self._exact.values()) + sum(b.nbytes() for b in buckets.values())

    def close(self) -> None:
        """Waits for all that is under way, so that the next job finds the lines free."""
        self._send()
        for place in self._places.values():
            place.bucket.arrive()
        self._exact.clear()
        self._places.clear()

    def _send(self) -> None:
        """Not before another bucket is read: what comes lies where this one's last message is read until then."""
        if self._open is not None:
            self._open.start(self.axis)
            self._open = None

    def _settle(self) -> None:
        """Messages of a synchronous evaluation get their places in buckets."""
        self._send()
        group: list[Hashable] = []
        size = 0
        for slot in [slot for slot in self._exact if slot not in self._places]:
            group.append(slot)
            size += _aligned(self._exact[slot][0].nbytes)
            if size >= BUCKET_BYTES:
                self._place(group, size)
                group, size = [], 0
        if group:
            self._place(group, size)
        for slot, gathered in self._exact.items():
            place = self._places[slot]
            place.bucket.arrive()
            place.all().copy_(gathered)
            place.own().copy_(gathered[self.axis.rank])
        self._exact.clear()

    def _place(self, slots: Sequence[Hashable], size: int) -> None:
        bucket = _Bucket.of(size, self.axis.degree, self._exact[slots[0]].device)
        start = 0
        for slot in slots:
            message = self._exact[slot][0]
            self._places[slot] = _Place(bucket, start, message.nbytes, message.dtype)
            start += _aligned(message.nbytes)


@dataclass
class _Bucket:
    """Messages that travel together, as bytes: this rank's, and those of all ranks that came last."""

    sent: Tensor
    received: Tensor
    _under_way: Handle | None = None

    @classmethod
    def of(cls, size: int, degree: int, device: torch.device) -> _Bucket:
        return cls(
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.empty(degree, size, dtype=torch.uint8, device=device),
        )

    def start(self, axis: MeshAxis) -> None:
        self._under_way = start_all_gather(self.sent.unsqueeze(0), axis, into=self.received)

    def arrive(self) -> None:
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None

    def nbytes(self) -> int:
        return self.sent.nbytes + self.received.nbytes


@dataclass(frozen=True)
class _Place:
    """Where a slot's message lies in its bucket: `nbytes` from `start` on."""

    bucket: _Bucket
    start: int
    nbytes: int
    dtype: torch.dtype

    def own(self) -> Tensor:
        return self.bucket.sent[self.start : self.start + self.nbytes].view(self.dtype)

    def all(self) -> Tensor:
        return self.bucket.received[:, self.start : self.start + self.nbytes].view(self.dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
