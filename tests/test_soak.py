"""Some seconds of mixed load by several clients; `parallel-mmdit bench soak --minutes 120` is the long run."""

from __future__ import annotations

import pytest

from parallel_backend.bench.soak import Report, run_soak

MIB = 2**20


@pytest.fixture(scope="module")
def report() -> Report:
    return run_soak(minutes=0.15, clients=3, warm_up_seconds=4)


def test_every_request_ends_once_and_as_in_quiet(report: Report) -> None:
    assert report.wrong == []
    assert {"picture", "cancelled", "decoded", "bad", "freed"} <= set(report.done)


def test_ranks_hold_afterwards_what_they_held_before(report: Report) -> None:
    for before, after in zip(report.before, report.after, strict=True):
        assert after.rss_anon - before.rss_anon < 48 * MIB
        assert after.descriptors <= before.descriptors + 4
        assert after.threads <= before.threads + 2
        assert after.shared_memory <= before.shared_memory
