"""Started this step, read the next step: what the other ranks of an axis had one evaluation ago.

Source: DistriFusion (Li et al. 2024, arXiv 2402.19481), section 4. A network has hundreds of small tensors to share;
they travel as a few large messages, while the rest of this evaluation and the start of the next are computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .collectives import Handle, all_gather, start_all_gather, start_neighbour_exchange
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
    """Tensors of the other ranks, by slot: those of the evaluation before this one.

    Every rank uses the same slots in the same order, and calls `end_evaluation` after each evaluation.
    """

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis
        self._kept: dict[Hashable, _Gathered | _Facing] = {}
        self._bucket = _Bucket(axis)

    def keep_gathered(self, slot: Hashable, by_rank: Sequence[Tensor]) -> None:
        """In a synchronous evaluation: what came fresh is what the next evaluation reads."""
        self._kept[slot] = _Gathered(by_rank)

    def keep_facing(self, slot: Hashable, received_N: Tensor) -> None:
        self._kept[slot] = _Facing(received_N)

    def swap_gathered(self, slot: Hashable, fresh: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Every rank's tensor of the last evaluation; `fresh`, of shapes[rank], is sent for the next one.

        Comm: later, in a bucket: (degree - 1) * fresh.numel() elements, padded to the largest rank's bucket.
        """
        stale = self._kept[slot].tensors()
        self._kept[slot] = self._bucket.share(fresh, shapes)
        self._start_if_full()
        return list(stale)

    def swap_facing(self, slot: Hashable, up_N: Tensor, down_N: Tensor, arriving: tuple[int, int]) -> Tensor:
        """What the neighbours sent in the last evaluation, flat, above before below; ours is sent for the next one.

        Comm: later, in a bucket: up.numel() and down.numel() elements, each to one neighbour.
        """
        (stale,) = self._kept[slot].tensors()
        self._kept[slot] = self._bucket.face(up_N, down_N, arriving)
        self._start_if_full()
        return stale

    def joined(self, slot: Hashable, own: Tensor, dim: int, counts: Sequence[int], phase: Phase) -> Tensor:
        """Every rank's tensor along `dim`: in sync all fresh, in displaced steps the others' of the last evaluation.

        Args:
            counts: each rank's length of `dim`.
        Comm: one all-gather, or as `swap_gathered`.
        """
        if phase == "sync":
            whole = all_gather(own, dim, counts, self.axis)
            self.keep_gathered(slot, whole.split(list(counts), dim=dim))
            return whole
        parts = self.swap_gathered(slot, own, [(*own.shape[:dim], n, *own.shape[dim + 1 :]) for n in counts])
        parts[self.axis.rank] = own
        return torch.cat(parts, dim=dim)

    def end_evaluation(self) -> None:
        """What is still to be sent goes on its way."""
        self._bucket.start()
        self._bucket = _Bucket(self.axis)

    def nbytes(self) -> int:
        """Of the tensors that the next evaluation reads. Waits for those under way."""
        return sum(tensor.nbytes for kept in self._kept.values() for tensor in kept.tensors())

    def close(self) -> None:
        """Waits for all that is under way, so that the next job finds the lines free."""
        self.end_evaluation()
        for kept in self._kept.values():
            kept.tensors()
        self._kept.clear()

    def _start_if_full(self) -> None:
        if self._bucket.size >= BUCKET_BYTES:
            self.end_evaluation()


class _Bucket:
    """Tensors that travel together, as bytes: some to every rank of the axis, some to a neighbour."""

    def __init__(self, axis: MeshAxis) -> None:
        self.axis = axis
        self.to_all: list[Tensor] = []
        self.used = [0] * axis.degree
        self.up: list[Tensor] = []
        self.down: list[Tensor] = []
        self.arriving = (0, 0)
        self._gathering: Handle | None = None
        self._facing: Handle | None = None

    @property
    def size(self) -> int:
        """Alike on every rank, so that all start a bucket at the same slot."""
        return max(self.used)

    def share(self, fresh: Tensor, shapes: Sequence[Sequence[int]]) -> _Gathered:
        places = []
        for rank, shape in enumerate(shapes):
            places.append((self.used[rank], tuple(shape)))
            self.used[rank] += _aligned(prod(shape) * fresh.itemsize)
        self.to_all.append(_as_bytes(fresh))
        return _Gathered((), self, places, fresh.dtype)

    def face(self, up_N: Tensor, down_N: Tensor, arriving: tuple[int, int]) -> _Facing:
        self.up.append(_as_bytes(up_N))
        self.down.append(_as_bytes(down_N))
        starts = self.arriving
        above, below = (_aligned(count * up_N.itemsize) for count in arriving)
        self.arriving = (starts[0] + above, starts[1] + below)
        return _Facing(None, self, starts, arriving, up_N.dtype)

    def start(self) -> None:
        if self.to_all:
            padding = self.to_all[0].new_zeros(max(self.used) - self.used[self.axis.rank])
            self._gathering = start_all_gather(torch.cat([*self.to_all, padding]), self.axis)
        if self.up:
            self._facing = start_neighbour_exchange(torch.cat(self.up), torch.cat(self.down), self.arriving, self.axis)
        self.to_all, self.up, self.down = [], [], []

    def gathered(self, rank: int, start: int, size: int) -> Tensor:
        assert self._gathering is not None, "read before the evaluation ended"
        start += rank * max(self.used)
        return self._gathering.wait()[start : start + size]

    def faced(self, side: int, start: int, size: int) -> Tensor:
        assert self._facing is not None, "read before the evaluation ended"
        start += side * self.arriving[0]
        return self._facing.wait()[start : start + size]


@dataclass
class _Gathered:
    """A tensor of each rank: here already, or as places in a bucket."""

    here: Sequence[Tensor]
    bucket: _Bucket | None = None
    places: Sequence[tuple[int, tuple[int, ...]]] = ()
    dtype: torch.dtype = torch.float32

    def tensors(self) -> Sequence[Tensor]:
        if self.bucket is None:
            return self.here
        found = []
        for rank, (start, shape) in enumerate(self.places):
            data = self.bucket.gathered(rank, start, prod(shape) * self.dtype.itemsize)
            found.append(data.view(self.dtype).view(shape))
        return found


@dataclass
class _Facing:
    """What both neighbours sent, flat: here already, or as two places in a bucket."""

    here: Tensor | None
    bucket: _Bucket | None = None
    starts: Sequence[int] = ()
    counts: Sequence[int] = ()
    dtype: torch.dtype = torch.float32

    def tensors(self) -> Sequence[Tensor]:
        if self.bucket is None:
            assert self.here is not None
            return [self.here]
        sides = [
            self.bucket.faced(side, start, count * self.dtype.itemsize).view(self.dtype)
            for side, (start, count) in enumerate(zip(self.starts, self.counts, strict=True))
        ]
        return [torch.cat(sides)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _as_bytes(x: Tensor) -> Tensor:
    data = x.contiguous().flatten().view(torch.uint8)
    missing = _aligned(data.numel()) - data.numel()
    return torch.cat([data, data.new_zeros(missing)]) if missing else data
