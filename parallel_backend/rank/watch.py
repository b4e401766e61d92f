"""Notices a rank that no longer answers, and a job that no longer moves, while ranks may be waiting in a collective.

A rank that dies is seen by its torchrun. One that was stopped is not, nor one behind a cut link: the first is seen in the
process table of its host, the second by a beat that each rank leaves in a store of its own on rank 0's host. The beats tell
how far each rank has come, too: where none comes any further, the job will never end.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import msgspec
import torch.distributed as dist

from ..distributed.links import REMEDY
from ..errors import RankError
from ..rpc import runtime_dir as files
from ..rpc.state import RankState
from .pulse import Pulse

log = logging.getLogger("parallel_backend")

LOOK_SECONDS = 1.0
# A stopped process may be going on again (a laptop's lid, a debugger); after so long it is taken for lost.
STOPPED_SECONDS = 5.0
SILENT_SECONDS = 15.0
# A cancelled job ends at its next step; who gave it up does not wait longer.
CANCEL_SECONDS = 20.0


class Beat(msgspec.Struct):
    """What a rank tells all others about once a second: `moves` and `started` are its pulse's."""

    count: int = 0
    moves: int = 0
    started: int = 0


class Watch(threading.Thread):
    """Every rank watches all others, so that it does not matter which one is lost.

    Args:
        ranks: all of them, in order.
        own: this rank's number.
        pulse: of this rank's jobs.
        on_fault: told what this process can't go on from.
    """

    def __init__(
        self, ranks: Sequence[RankState], own: int, pulse: Pulse, on_fault: Callable[[RankError], None]
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._own, self._pulse, self._on_fault = ranks[own], pulse, on_fault
        here = [rank for rank in ranks if (rank.host, rank.machine) == (self._own.host, self._own.machine)]
        self._neighbours = [rank for rank in here if rank.rank != own]
        self._far = [rank for rank in ranks if rank not in here]
        self._stopped_since: dict[int, float] = {}
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._seen: tuple[object, float] = None, 0.0
        self._cancelled_since: float | None = None
        self._ended = threading.Event()
        self._beats = _Beats(own, [rank.rank for rank in ranks if rank.rank != own]) if len(ranks) > 1 else None
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
                self._seen = (
                    self._seen[0],
                    self._seen[1] + now - last,
                )  # a busy machine's pauses add up to no standstill
            last = now
            if os.getppid() != self._agent:
                self._on_fault(RankError(f"torchrun (process {self._agent}) is gone"))
            for rank in self._neighbours:
                self._look_at(rank, now)
            beats = self._beats.heard if self._beats is not None else {}
            self._listen(beats, now)
            self._look_at_job(beats, now)
            self._look_for_a_cancel(now)

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
            self._on_fault(RankError(words))

    def _listen(self, heard: Mapping[int, Beat], now: float) -> None:
        for rank in self._far:
            before, since = self._heard.get(rank.rank, (Beat(), now))
            if rank.rank not in self._heard or heard.get(rank.rank, before) != before:
                self._heard[rank.rank] = heard.get(rank.rank, Beat()), now
            elif now - since > SILENT_SECONDS:
                words = f"rank {rank.rank} on {rank.host} has not been heard of for {SILENT_SECONDS:.0f} s"
                self._on_fault(RankError(words))

    def _look_at_job(self, heard: Mapping[int, Beat], now: float) -> None:
        """A rank whose job is done may wait for the next one for days; one whose job goes on moves, or another does."""
        job, own = self._pulse.job, Beat(moves=self._pulse.moves(), started=self._pulse.started)
        if self._beats is not None:
            self._beats.own = own
        ranks = {self._own.rank: own, **heard}
        seen = (job, [(rank, beat.moves) for rank, beat in sorted(ranks.items())])
        if not job or seen != self._seen[0]:
            self._seen = seen, now
        elif now - self._seen[1] > self._pulse.patience:
            words = f"no rank has moved for {self._pulse.patience:.0f} s in {job}{_who_is_behind(ranks)}"
            self._on_fault(RankError(words, REMEDY))

    def _look_for_a_cancel(self, now: float) -> None:
        """Only rank 0 hears of one."""
        if not (self._pulse.job and self._pulse.cancelled()):
            self._cancelled_since = None
        elif self._cancelled_since is None:
            self._cancelled_since = now
        elif now - self._cancelled_since > CANCEL_SECONDS:
            words = f"{self._pulse.job} was cancelled and had not heard of it after {CANCEL_SECONDS:.0f} s"
            self._on_fault(RankError(words))


def _who_is_behind(ranks: Mapping[int, Beat]) -> str:
    fewest, most = (choose(beat.started for beat in ranks.values()) for choose in (min, max))
    behind = [str(rank) for rank, beat in sorted(ranks.items()) if beat.started == fewest]
    if fewest == most:
        return f"; all have started {most} collectives"
    return f"; rank {', '.join(behind)} has started {fewest} collectives, others up to {most}"


class _Beats(threading.Thread):
    """Leaves this rank's beat and reads those of others, in a thread of its own: behind a cut link it may stand still.

    `own` is what to tell, `heard` the last beat of each other rank.
    """

    def __init__(self, rank: int, others: Sequence[int]) -> None:
        super().__init__(name="beats", daemon=True)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SILENT_SECONDS))
        self._store = dist.PrefixStore(f"beats-{restarts}", store)
        self._rank, self._others = rank, others
        self.own = Beat()
        self.heard: dict[int, Beat] = {}

    def run(self) -> None:
        count = 0
        while True:
            own = msgspec.structs.replace(self.own, count=count)
            try:
                self._store.set(str(self._rank), msgspec.json.encode(own).decode())
                beats = self._store.multi_get([str(rank) for rank in self._others])
                read = (msgspec.json.decode(beat, type=Beat) for beat in beats)
                self.heard = dict(zip(self._others, read, strict=True))
            except (RuntimeError, ValueError) as error:
                log.warning("no beat can be left or read: %s", str(error)[:200])
            count += 1
            time.sleep(LOOK_SECONDS)
