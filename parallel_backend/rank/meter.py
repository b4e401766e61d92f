"""How far long work is, told a few times a second: by rank 0 of its own part, so that no rank waits for another to tell."""

from __future__ import annotations

import time

from ..rpc.messages import Progress
from ..rpc.state import Unit
from .jobs import Job

EVERY_SECONDS = 0.2


class Meter:
    """Of one piece of work in a job.

    Args:
        total: of `unit`; where it is not known before, `at` is told it.
        quiet_seconds: nothing is said of work that takes no longer.
    """

    def __init__(self, job: Job, what: str, unit: Unit, total: int = 0, quiet_seconds: float = 0.0) -> None:
        self._job, self._what, self._unit, self._total = job, what, unit, total
        self._done, self._said = 0, -1
        self._next = time.monotonic() + quiet_seconds

    def add(self, count: int) -> None:
        """So much more is done. Parts are about as large as they were expected to be: only `finish` says that all is."""
        self._done += count
        self.at(min(self._done, self._total), self._total)

    def at(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_SECONDS
            self._say(done)

    def finish(self) -> None:
        """All is done; said where anything was."""
        if 0 <= self._said < self._total:
            self._say(self._total)

    def _say(self, done: int) -> None:
        self._said = done
        self._job.emit(Progress(self._what, done, self._total, self._unit), [])
