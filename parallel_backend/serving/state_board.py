"""What `status` tells: written by the computing thread, read by the socket's thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ..rpc.messages import BackendState, Progress, Reply, Result, StepDone, Welcome
from ..rpc.state import JobCost, JobState, Unit
from ..version import __version__


@dataclass(frozen=True)
class _Reached:
    """How far a job is; `first` and `last` are when the first step and the latest were told."""

    what: str = ""
    done: int = 0
    total: int = 0
    unit: Unit = ""
    steps: int = 0
    first: float = 0.0
    last: float = 0.0

    @property
    def step_seconds(self) -> float | None:
        return (self.last - self.first) / (self.steps - 1) if self.steps > 1 else None


class StateBoard:
    def __init__(self, name: str, welcome: Welcome, **known: Any) -> None:
        """`known` are fields of BackendState."""
        self.welcome = welcome
        self._started = self._rested = self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._latest = BackendState(__version__, welcome.generation, name, **known)
        self._reached = _Reached()

    def snapshot(self, queued: int) -> BackendState:
        now, latest, reached = time.monotonic(), self._latest, self._reached
        job, quiet = latest.job, 0.0 if latest.running else now - self._rested
        if job is not None:
            job = msgspec.structs.replace(
                job,
                what=reached.what,
                done=reached.done,
                total=reached.total,
                unit=reached.unit,
                seconds=now - self._begun,
                step_seconds=reached.step_seconds,
            )
        return msgspec.structs.replace(latest, uptime=now - self._started, queued=queued, quiet=quiet, job=job)

    def note(self, **changes: object) -> None:
        with self._lock:
            self._latest = msgspec.structs.replace(self._latest, **changes)

    def begin(self, kind: str, model: str, client: str) -> None:
        """A job runs from now on."""
        self._begun, self._reached = time.monotonic(), _Reached()
        self.note(running=kind, job=JobState(kind, model, client))

    def tell(self, reply: Reply) -> None:
        """How far the job is, by what its client is told: for each step, so nothing is waited for or copied."""
        now, before = time.monotonic(), self._reached
        if isinstance(reply, StepDone):
            first = before.first if before.steps else now
            self._reached = _Reached("", reply.index + 1, reply.total, "", before.steps + 1, first, now)
        elif isinstance(reply, Progress):
            self._reached = replace(before, what=reply.what, done=reply.done, total=reply.total, unit=reply.unit)

    def end(self, reply: Reply, **changes: object) -> None:
        """No job runs. Of a sampling that has ended well, what it cost is kept."""
        job, self._rested = self._latest.job, time.monotonic()
        if isinstance(reply, Result) and reply.steps and job is not None:
            waits = [cost.waited for cost in reply.costs if cost.waited is not None]
            sent, waited = sum(cost.sent_bytes for cost in reply.costs), sum(waits) if waits else None
            changes["last"] = JobCost(job.kind, job.model, reply.seconds, reply.steps, sent, waited)
        self.note(running="", job=None, **changes)

    def count_job(self, failed: bool) -> None:
        latest = self._latest
        self.note(jobs_done=latest.jobs_done + 1, jobs_failed=latest.jobs_failed + failed)

    def count_refused(self) -> int:
        """One message more that could not be read; how many that makes."""
        self.note(refused=self._latest.refused + 1)
        return self._latest.refused
