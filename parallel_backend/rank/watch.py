"""Notices a rank that no longer answers, while the others may be waiting for it in a collective.

A rank that dies is seen by its torchrun. One that was stopped is not, nor one behind a cut link: the first is seen in the
process table of its host, the second by a beat that each rank leaves in a store of its own on rank 0's host.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from ..rpc import runtime_dir as files
from ..rpc.messages import RankState

log = logging.getLogger("parallel_backend")

LOOK_SECONDS = 1.0
# A stopped process may be going on again (a laptop's lid, a debugger); after so long it is taken for lost.
STOPPED_SECONDS = 5.0
SILENT_SECONDS = 15.0


class Watch(threading.Thread):
    """Every rank watches all others, so that it does not matter which one is lost.

    Args:
        ranks: all of them, in order.
        own: this rank's number.
        on_fault: told in a sentence what this process can't go on from.
    """

    def __init__(self, ranks: Sequence[RankState], own: int, on_fault: Callable[[str], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self._own, self._on_fault = ranks[own], on_fault
        here = [rank for rank in ranks if (rank.host, rank.machine) == (self._own.host, self._own.machine)]
        self._neighbours = [rank for rank in here if rank.rank != own]
        self._far = [rank for rank in ranks if rank not in here]
        self._stopped_since: dict[int, float] = {}
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._beats = _Beats(self._own.rank, [rank.rank for rank in self._far]) if self._far else None
        self._agent = os.getppid()

    def stop(self) -> None:
        """Looks at nothing any more; ranks may end in any order."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        last = time.monotonic()
        if self._beats is not None:
            self._beats.start()
        while not self._ended.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - last > 3 * LOOK_SECONDS:  # this process itself stood still: what it knows of the others is old
                self._stopped_since.clear()
                self._heard.clear()
            last = now
            if os.getppid() != self._agent:
                self._on_fault(f"torchrun (process {self._agent}) is gone")
            for rank in self._neighbours:
                self._look_at(rank, now)
            if self._beats is not None:
                self._listen(self._beats.heard, now)

    def _look_at(self, rank: RankState, now: float) -> None:
        if not files.is_stopped(rank.pid):
            self._stopped_since.pop(rank.rank, None)
        elif now - self._stopped_since.setdefault(rank.rank, now) > STOPPED_SECONDS:
            words = f"rank {rank.rank} (process {rank.pid}) was stopped for {STOPPED_SECONDS:.0f} s and is ended"
            log.error("%s", words)
            try:
                os.kill(rank.pid, signal.SIGKILL)  # its torchrun sees that, and starts all ranks anew
            except ProcessLookupError:
                return
            self._on_fault(words)

    def _listen(self, heard: dict[int, bytes], now: float) -> None:
        for rank in self._far:
            before, since = self._heard.get(rank.rank, (b"", now))
            if rank.rank not in self._heard or heard.get(rank.rank, before) != before:
                self._heard[rank.rank] = heard.get(rank.rank, b""), now
            elif now - since > SILENT_SECONDS:
                self._on_fault(f"rank {rank.rank} on {rank.host} has not been heard of for {SILENT_SECONDS:.0f} s")


class _Beats(threading.Thread):
    """Leaves this rank's beat and reads those of others, in a thread of its own: behind a cut link it may stand still.

    `heard` is the last beat of each.
    """

    def __init__(self, own: int, others: Sequence[int]) -> None:
        super().__init__(name="beats", daemon=True)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SILENT_SECONDS))
        self._store = dist.PrefixStore(f"beats-{restarts}", store)
        self._own, self._others = own, others
        self.heard: dict[int, bytes] = {}

    def run(self) -> None:
        count = 0
        while True:
            try:
                self._store.set(str(self._own), str(count))
                self.heard = {rank: self._store.get(str(rank)) for rank in self._others}
            except (RuntimeError, ValueError) as error:
                log.warning("no beat can be left or read: %s", str(error)[:200])
            count += 1
            time.sleep(LOOK_SECONDS)
