"""Started this step, read the next step: what the other ranks of an axis had one evaluation ago.

Source: DistriFusion (Li et al. 2024, arXiv 2402.19481), section 4. A network has hundreds of small tensors to share;
they travel as a few large messages, while the rest of this evaluation and the start of the next are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal
from weakref import ref

import torch
from torch import Tensor

from .collectives import Handle, start_all_gather
from .mesh import MeshAxis
from .step_cache import BranchCache, StepCaches
from .traffic import Timeline

# Large enough that a message's start costs nothing beside it, small enough that most of a step's are under way early.
BUCKET_BYTES = 8 * 2**20
ALIGNED = 16

Phase = Literal["sync", "displaced"]


@dataclass
class Kept:
    """What one job keeps from evaluation to evaluation; it dies with the job.

    `begun` are the uses of ControlNets that have been evaluated. `stale` and `token_kv` are there only in jobs that have displaced steps: the first where ranks share what they have
    by messages, the second where patches of `num_patches` flow through a pipeline. `caches` are there in jobs that ask for a step cache. `timeline` is there where the job is to be told of in detail.
    """

    stale: StaleExchanges | None = None
    token_kv: dict[Hashable, TokenKV] | None = None
    num_patches: int = 1
    caches: StepCaches | None = None
    begun: set[Hashable] = field(default_factory=set)
    timeline: Timeline | None = None

    def nbytes(self) -> int:
        """Of all that is kept now."""
        kv = self.token_kv.values() if self.token_kv is not None else ()
        stale = self.stale.nbytes() if self.stale is not None else 0
        cached = self.caches.nbytes() if self.caches is not None else 0
        return stale + cached + sum(tokens.nbytes() for tokens in kv)

    def close(self) -> None:
        """Waits for all that is under way, so that the next job finds the lines free."""
        if self.stale is not None:
            self.stale.close()


@dataclass(frozen=True)
class Step:
    """Which evaluation of a job this is. `branch` tells apart calls that one step makes: for cond and for uncond, of ControlNets.

    `sigma` is the noise's, as on the CPU; None outside of a sampling. `is_shallow`: of a UNet's evaluation the outermost blocks alone
    will be computed, so that of a ControlNet only what it gives these is asked for.
    """

    index: int = 0
    phase: Phase = "sync"
    branch: Hashable = 0
    kept: Kept | None = None
    sigma: float | None = None
    is_shallow: bool = False

    @property
    def stale(self) -> StaleExchange | None:
        """This branch's."""
        return self.kept.stale.of(self.branch) if self.kept is not None and self.kept.stale is not None else None

    @property
    def cache(self) -> BranchCache | None:
        """That of the model's own calls of this branch; ControlNets have none."""
        caches = None if self.kept is None else self.kept.caches
        return None if caches is None or not isinstance(self.branch, int) else caches.branches[self.branch]


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
    """Messages of all ranks of an axis, by slot, in the evaluations of one branch: those of the evaluation before this one.

    Every rank uses the same slots in the same order, and calls `end_evaluation` after each evaluation. What is sent and
    what has come lie in buckets, at the same addresses from the first displaced evaluation to the last of a job, and of other
    jobs with the same messages where these are given the same buckets.
    """

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis
        self.buckets: Buckets | None = None
        self._exact: dict[Hashable, Tensor] = {}
        self._open: _Bucket | None = None

    @property
    def is_used(self) -> bool:
        """Whether there are messages."""
        return bool(self._exact) or self.buckets is not None

    def keep(self, slot: Hashable, gathered_RN: Tensor) -> None:
        """In a synchronous evaluation: what came fresh is what the next evaluation reads."""
        self._exact[slot] = gathered_RN

    def swap(self, slot: Hashable, write: Callable[[Tensor], object]) -> Tensor:
        """Every rank's message (R, N) of the last evaluation, to be read before this one ends.

        Args:
            write: puts this rank's message (N,) in the tensor that it is given, from where it is sent for the next evaluation.
        Comm: later, in a bucket: (degree - 1) * N elements.
        """
        self.settle()
        assert self.buckets is not None, "a displaced evaluation comes after a synchronous one"
        place = self.buckets.places[slot]
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
        """What is still to be sent goes on its way; what came fresh lies in the buckets, where there are any."""
        self._send()
        if self.buckets is not None:
            self.settle()

    def settle(self) -> None:
        """Messages of the last synchronous evaluation lie in buckets; the first such get theirs."""
        if not self._exact:
            return
        if self.buckets is None:
            self.buckets = Buckets(self._exact, self.axis.degree)
            self.buckets.take(self)
        for slot, gathered in self._exact.items():
            place = self.buckets.places[slot]
            place.bucket.arrive()
            place.all().copy_(gathered)
            place.own().copy_(gathered[self.axis.rank])
        self._exact.clear()

    def adopt(self, buckets: Buckets) -> None:
        """Messages lie in these, of a job before this one, where they have no place yet and no other job has that one."""
        if not self.is_used and buckets.user is None:
            self.buckets = buckets
            buckets.take(self)

    def arrive(self) -> None:
        """Nothing is under way."""
        if self.buckets is not None:
            self.buckets.arrive()

    def break_off(self) -> None:
        """What an evaluation that was only recorded has started and kept is forgotten; nothing was under way before it."""
        self._exact.clear()
        self._open = None
        if self.buckets is not None:
            self.buckets.forget()

    def nbytes(self) -> int:
        """Of the messages that the next evaluation reads, and of those on their way."""
        placed = 0 if self.buckets is None else self.buckets.nbytes()
        return sum(kept.nbytes for kept in self._exact.values()) + placed

    def close(self) -> None:
        """Waits for all that is under way, so that the next job finds the lines and the buckets free."""
        self._send()
        self.arrive()
        self._exact.clear()
        if self.buckets is not None:
            self.buckets.leave()
            self.buckets = None

    def _send(self) -> None:
        """Not before another bucket is read: what comes lies where this one's last message is read until then."""
        if self._open is not None:
            self._open.start(self.axis)
            self._open = None


class StaleExchanges:
    """Those of a job, one for each branch."""

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis
        self._of: dict[Hashable, StaleExchange] = {}

    def of(self, branch: Hashable) -> StaleExchange:
        if branch not in self._of:
            self._of[branch] = StaleExchange(self.axis)
        return self._of[branch]

    def nbytes(self) -> int:
        return sum(exchange.nbytes() for exchange in self._of.values())

    def close(self) -> None:
        for exchange in self._of.values():
            exchange.close()


class Buckets:
    """Where the messages of a branch lie, in the order of their slots; one exchange at a time has them."""

    def __init__(self, messages: Mapping[Hashable, Tensor], degree: int) -> None:
        """`messages`: (R, N) each, whose sizes count."""
        self.places: dict[Hashable, _Place] = {}
        self._all: list[_Bucket] = []
        self._user: ref[StaleExchange] | None = None
        group: list[Hashable] = []
        size = 0
        for slot in messages:
            group.append(slot)
            size += _aligned(messages[slot][0].nbytes)
            if size >= BUCKET_BYTES:
                self._add({slot: messages[slot] for slot in group}, size, degree)
                group, size = [], 0
        if group:
            self._add({slot: messages[slot] for slot in group}, size, degree)

    def _add(self, messages: Mapping[Hashable, Tensor], size: int, degree: int) -> None:
        bucket = _Bucket.of(size, degree, next(iter(messages.values())).device)
        self._all.append(bucket)
        start = 0
        for slot, gathered in messages.items():
            message = gathered[0]
            self.places[slot] = _Place(bucket, start, message.nbytes, message.dtype)
            start += _aligned(message.nbytes)

    @property
    def user(self) -> StaleExchange | None:
        """Who has them, unless it is gone."""
        return None if self._user is None else self._user()

    def take(self, exchange: StaleExchange) -> None:
        self._user = ref(exchange)

    def leave(self) -> None:
        self._user = None

    def arrive(self) -> None:
        for bucket in self._all:
            bucket.arrive()

    def forget(self) -> None:
        for bucket in self._all:
            bucket.under_way = None

    def nbytes(self) -> int:
        return sum(bucket.nbytes() for bucket in self._all)


@dataclass
class _Bucket:
    """Messages that travel together, as bytes: this rank's, and those of all ranks that came last."""

    sent: Tensor
    received: Tensor
    under_way: Handle | None = None

    @classmethod
    def of(cls, size: int, degree: int, device: torch.device) -> _Bucket:
        return cls(
            torch.empty(size, dtype=torch.uint8, device=device),
            torch.empty(degree, size, dtype=torch.uint8, device=device),
        )

    def start(self, axis: MeshAxis) -> None:
        self.under_way = start_all_gather(self.sent.unsqueeze(0), axis, into=self.received)

    def arrive(self) -> None:
        if self.under_way is not None:
            self.under_way.wait()
            self.under_way = None

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
