"""Some seconds of mixed load by several clients; `parallel-mmdit bench soak --minutes 120` is the long run."""

from __future__ import annotations

from parallel_backend.bench.soak import Report

MIB = 2**20


def test_every_request_ends_once_and_as_in_quiet(ran_beside: Report) -> None:
    assert ran_beside.wrong == []
    assert {"picture", "cancelled", "decoded", "bad", "freed"} <= set(ran_beside.done)


def test_ranks_hold_afterwards_what_they_held_before(ran_beside: Report) -> None:
    for before, after in zip(ran_beside.before, ran_beside.after, strict=True):
        assert after.rss_anon - before.rss_anon < 48 * MIB
        assert after.descriptors <= before.descriptors + 4
        assert after.threads <= before.threads + 2
        assert after.shared_memory <= before.shared_memory
