"""Whose job is next: clients take turns, and each client's own jobs keep their order."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from ..rpc.headers import RequestHeader
from ..rpc.messages import Request
from ..rpc.wire import pack


@dataclass(eq=False)
class QueuedJob:
    """A request that waits or runs, with who sent it. `cancelled` may be set by the socket's thread; `sender` is the client's name."""

    client: bytes
    number: int
    frames: list[memoryview]
    sender: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def label(self) -> str:
        """As the logs name it."""
        return f"{self.client.hex()[:6]}/{self.number}"


def own_job(body: Request) -> QueuedJob:
    """A job that rank 0 gives to all ranks itself; nobody is told how it ended."""
    return QueuedJob(b"", 0, [memoryview(frame) for frame in pack(RequestHeader(0, body), [])])


class Turns:
    """The jobs that wait. One that was cancelled waits too: its client is owed a reply."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, deque[QueuedJob]] = OrderedDict()
        self._changed = threading.Condition()
        self.ended = False

    def put(self, job: QueuedJob) -> None:
        with self._changed:
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def end(self) -> None:
        """No job is handed out any more."""
        with self._changed:
            self.ended = True
            self._changed.notify()

    def get(self, seconds: float) -> QueuedJob | None:
        """The next job, once there is one; None after `end`.

        Raises: queue.Empty: none came within `seconds`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.ended or self._waiting, seconds):
                raise queue.Empty
            if self.ended:
                return None
            client, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[client] = jobs
            return job

    def ahead_of(self, job: QueuedJob) -> int | None:
        """How many of the waiting jobs come before `job`; None where it does not wait."""
        with self._changed:
            rounds = [
                (place, turn, j) for turn, jobs in enumerate(self._waiting.values()) for place, j in enumerate(jobs)
            ]
        order = [j for _, _, j in sorted(rounds, key=lambda entry: entry[:2])]
        return order.index(job) if job in order else None

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))
