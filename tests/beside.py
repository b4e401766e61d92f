"""Long runs, mostly of waiting, that go on beside the tests: begun with the first one, looked at by their own, which come late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from apart import run_apart
from compiled_pictures import run_compiled
from rank_pool import forkserver
from two_hosts import run_two_hosts

from parallel_backend.bench.faults import run_faults
from parallel_backend.bench.soak import run_soak

# By the module whose tests look at what came of it; what holds most memory comes while others have hardly begun.
RUNS: dict[str, Callable[[], Any]] = {
    "test_hosts": run_two_hosts,
    "test_compiled": run_compiled,
    "test_faults": run_faults,
    "test_soak": partial(run_soak, minutes=0.15, clients=3, warm_up_seconds=4),
}


def looks_beside(item: pytest.Item) -> bool:
    return "ran_beside" in getattr(item, "fixturenames", ())


@contextmanager
def run_beside(items: Sequence[pytest.Item], apart: Sequence[pytest.Item]) -> Iterator[dict[str, Future[Any]]]:
    """The runs that these tests look at, one after the other in a process of their own, and meanwhile the tests that run apart."""
    wanted = RUNS.keys() & {item.path.stem for item in items if looks_beside(item)}
    with ExitStack() as pools:
        runs: dict[str, Future[Any]] = {}
        if wanted:
            pool = ProcessPoolExecutor(1, mp_context=forkserver())
            pools.callback(pool.shutdown, cancel_futures=True)
            runs = {module: pool.submit(run) for module, run in RUNS.items() if module in wanted}
            list(runs.values())[-1].add_done_callback(lambda _: pool.shutdown(wait=False))  # its memory goes
        if apart:
            thread = ThreadPoolExecutor(1)
            pools.callback(thread.shutdown, cancel_futures=True)
            runs["apart"] = thread.submit(run_apart, [item.nodeid for item in apart])
        yield runs
