"""Stale messages on real ranks: what is read is what the others wrote an evaluation ago, wherever it lay on its way."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor

from parallel_backend.distributed import stale
from parallel_backend.distributed.mesh import MeshAxis
from parallel_backend.distributed.stale import ALIGNED, StaleExchange, StaleExchanges

# Odd sizes of several types, so that places in a bucket need their alignment.
SLOTS: dict[str, tuple[int, torch.dtype]] = {
    "a": (3, torch.bfloat16),
    "b": (5, torch.float32),
    "c": (1, torch.float16),
    "d": (40, torch.float32),
    "e": (7, torch.bfloat16),
}
LATER = {"later": (9, torch.float32)}


def world_axis() -> MeshAxis:
    return MeshAxis("all", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def message(slot: str, evaluation: int, rank: int) -> Tensor:
    size, dtype = (SLOTS | LATER)[slot]
    seed = 1000 * evaluation + 10 * rank + ord(slot[0])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def all_messages(slot: str, evaluation: int, degree: int) -> Tensor:
    return torch.stack([message(slot, evaluation, rank) for rank in range(degree)])


def stale_case(bucket_bytes: int) -> tuple[int, int, int]:
    """(buckets, messages of one displaced evaluation, bytes kept) of this rank; what it reads is checked on the way."""
    stale.BUCKET_BYTES, before = bucket_bytes, stale.BUCKET_BYTES
    axis = world_axis()
    exchanges = StaleExchanges(axis)
    exchange, other = exchanges.of("model"), exchanges.of("a ControlNet")
    written: dict[str, int] = {}

    def exact(slots: list[str], evaluation: int, exchange: StaleExchange = exchange) -> None:
        for slot in slots:
            exchange.keep(slot, all_messages(slot, evaluation, axis.degree))
            written[slot] = evaluation

    def displaced(slots: list[str], evaluation: int, exchange: StaleExchange = exchange) -> None:
        for slot in slots:
            read = exchange.swap(slot, lambda sent, slot=slot: sent.copy_(message(slot, evaluation, axis.rank)))
            assert torch.equal(read, all_messages(slot, written[slot], axis.degree)), (slot, evaluation)
        for slot in slots:
            written[slot] = evaluation

    try:
        everything = list(SLOTS)
        exact(everything, 0)
        exchange.end_evaluation()
        exact(everything, 1)
        exchange.end_evaluation()
        started = axis.traffic.collectives
        displaced(everything, 2)
        exchange.end_evaluation()
        messages = axis.traffic.collectives - started
        displaced(["a", "d"], 3)  # the others are read an evaluation later, as they were
        exchange.end_evaluation()
        exact(list(LATER), 4, other)  # a ControlNet that begins now: its evaluations are between the model's
        other.end_evaluation()
        displaced(everything, 4)
        exchange.end_evaluation()
        displaced(list(LATER), 5, other)
        other.end_evaluation()
        displaced(everything, 5)
        exchange.end_evaluation()
        exact(everything, 7)
        exchange.end_evaluation()
        displaced(list(LATER), 8, other)
        other.end_evaluation()
        displaced(everything, 8)
        exchange.end_evaluation()
        assert exchange.buckets is not None
        buckets = exchange.buckets
        places = [buckets.places[slot] for slot in everything]
        assert all(place.start % ALIGNED == 0 for place in places)
        kept = exchange.nbytes()
        exchanges.close()
        assert exchanges.nbytes() == 0 and buckets.user is None
        return len({id(place.bucket) for place in places}), messages, kept
    finally:
        stale.BUCKET_BYTES = before


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1 << 20, 1), (1, 5), (40, 3)])
def test_ranks_read_what_was_written_an_evaluation_ago(
    world_size: int, bucket_bytes: int, buckets: int, ranks: RankPool
) -> None:
    found = ranks(world_size, stale_case, bucket_bytes)
    assert {(count, messages) for count, messages, _ in found} == {(buckets, buckets)}
    assert all(kept > 0 for *_, kept in found)


def joined_case(phase_by_evaluation: list[stale.Phase], dim: int) -> bool:
    """Unequal lengths along any dim: own part fresh, the others' of the last evaluation."""
    axis = world_axis()
    counts = [3, 1, 2, 2][: axis.degree]
    exchange = StaleExchange(axis)

    def parts(evaluation: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(evaluation)
        shapes = [[count if d == dim else 2 + d for d in range(3)] for count in counts]
        return [torch.randn(*shape, generator=generator) for shape in shapes]

    for evaluation, phase in enumerate(phase_by_evaluation):
        now, last = parts(evaluation), parts(evaluation - 1) if evaluation else parts(evaluation)
        found = exchange.joined("slot", now[axis.rank], dim, counts, phase)
        exchange.end_evaluation()
        expected = [now[r] if phase == "sync" or r == axis.rank else last[r] for r in range(axis.degree)]
        if not torch.equal(found, torch.cat(expected, dim)):
            return False
    exchange.close()
    return True


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_joined_tensors_are_fresh_where_they_are_ones_own(world_size: int, dim: int, ranks: RankPool) -> None:
    phases: list[stale.Phase] = ["sync", "displaced", "displaced", "sync", "displaced"]
    assert all(ranks(world_size, joined_case, phases, dim))


def adopted_case() -> list[bool]:
    """The next job's messages lie where the last one's lay, unless another job has that place still."""
    axis = world_axis()
    jobs = [StaleExchange(axis) for _ in range(4)]
    first, second, third, fourth = jobs

    def exact(job: StaleExchange, evaluation: int) -> None:
        for slot in SLOTS:
            job.keep(slot, all_messages(slot, evaluation, axis.degree))
        job.end_evaluation()

    def reads(job: StaleExchange, evaluation: int) -> bool:
        found = [
            torch.equal(
                job.swap(slot, lambda sent, slot=slot: sent.copy_(message(slot, evaluation, axis.rank))),
                all_messages(slot, evaluation - 1, axis.degree),
            )
            for slot in SLOTS
        ]
        job.end_evaluation()
        return all(found)

    exact(first, 0)
    right = [reads(first, 1), reads(first, 2)]
    buckets = first.buckets
    assert buckets is not None
    second.adopt(buckets)
    right += [second.buckets is None]
    first.close()
    second.adopt(buckets)
    exact(second, 3)  # in the buckets at once: a recording of it would have nothing to tell Python
    right += [second.buckets is buckets, not second._exact, reads(second, 4), reads(second, 5)]
    third.adopt(buckets)
    del second, jobs  # a job that ended without a word
    fourth.adopt(buckets)
    right += [third.buckets is None, fourth.buckets is buckets]
    return right


def test_messages_of_the_next_job_lie_where_the_last_ones_lay(ranks: RankPool) -> None:
    assert all(all(found) for found in ranks(2, adopted_case))
