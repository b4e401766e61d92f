"""Gloo ranks for tests of the parallel methods: a test names a function, and every rank runs it."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel_backend.distributed.mesh import Groups
from parallel_backend.distributed.shared_cores import never_preempt

# What ranks share the memory of, and don't import one after the other.
PRELOADED = ["parallel_backend.rank.engine", "pytest", "rank_pool", "reference_models", "frozen"]
TESTS = str(Path(__file__).parent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forkserver() -> mp.context.ForkServerContext:
    """Starts processes within a tenth of a second, which share what they have imported.

    The server of all of them is started here: before Python 3.13 it looks for what it is to preload on the path of its
    environment alone, and goes on without what isn't there.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = TESTS if before is None else f"{TESTS}{os.pathsep}{before}"
    try:
        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


@cache
def groups() -> Groups:
    """The process groups of this rank, made once for all cases that it runs."""
    return Groups()


def join_gloo(rank: int, world_size: int) -> None:
    """This process is a rank on the CPU. Where to meet is in the environment."""
    torch.set_num_threads(1)
    never_preempt()
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))


class RankPool:
    """`pool(2, function, *args)` gives the list of function(*args) over ranks 0 and 1.

    Args:
        join: makes a process the rank of that number in a world of that size.
        context: what starts processes; None is `forkserver`.
        seconds: how long an answer may take; None is for ever.
    """

    def __init__(
        self,
        join: Callable[[int, int], None] = join_gloo,
        context: mp.context.BaseContext | None = None,
        seconds: float | None = None,
    ) -> None:
        self._worlds: dict[int, tuple[list[mp.Process], list[Connection]]] = {}
        self._join, self._context, self._seconds = join, context, seconds

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if world_size == 1:
            return [function(*args)]
        if world_size not in self._worlds:
            self._worlds[world_size] = self._start(world_size)
        _, lines = self._worlds[world_size]
        for line in lines:
            line.send((function, args))
        answers = [self._answer(rank, line) for rank, line in enumerate(lines)]
        failed = [text for ok, text in answers if not ok]
        if failed:
            self._end(world_size)
            raise AssertionError(f"{len(failed)} of {world_size} ranks failed:\n{failed[0]}")
        return [value for _, value in answers]

    def _answer(self, rank: int, line: Connection) -> tuple[bool, Any]:
        if self._seconds is not None and not line.poll(self._seconds):
            return False, f"rank {rank} gave no answer within {self._seconds:.0f} s"
        try:
            return line.recv()
        except EOFError:
            return False, f"rank {rank} is gone"

    def _start(self, world_size: int) -> tuple[list[mp.Process], list[Connection]]:
        context, port = self._context or forkserver(), free_port()
        processes, lines = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._join, rank, world_size, port, theirs), daemon=True)
            process.start()
            processes.append(process)
            lines.append(ours)
        return processes, lines

    def _end(self, world_size: int) -> None:
        processes, _ = self._worlds.pop(world_size)
        for process in processes:
            process.kill()

    def close(self) -> None:
        for world_size in list(self._worlds):
            self._end(world_size)


def _serve(join: Callable[[int, int], None], rank: int, world_size: int, port: int, line: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answer = _outcome(rank, join, rank, world_size)
    while True:
        function, args = line.recv()
        if answer[0]:
            answer = _outcome(rank, function, *args)
        line.send(answer)


def _outcome(rank: int, function: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except BaseException:  # noqa: BLE001 - the test process must hear of every failure
        return False, f"rank {rank}:\n{traceback.format_exc()}"
