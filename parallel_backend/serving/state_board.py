"""What `status` tells: written by the computing thread after each job, read by the socket's thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec

from ..rpc.messages import BackendState, Welcome
from ..version import __version__


class StateBoard:
    def __init__(self, name: str, welcome: Welcome, **known: Any) -> None:
        """`known` are fields of BackendState."""
        self.welcome = welcome
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._latest = BackendState(__version__, welcome.generation, name, **known)

    def snapshot(self, queued: int) -> BackendState:
        return msgspec.structs.replace(self._latest, uptime=time.monotonic() - self._started, queued=queued)

    def note(self, **changes: object) -> None:
        with self._lock:
            self._latest = msgspec.structs.replace(self._latest, **changes)

    def count_job(self, failed: bool) -> None:
        latest = self._latest
        self.note(running="", jobs_done=latest.jobs_done + 1, jobs_failed=latest.jobs_failed + failed)

    def count_refused(self) -> int:
        """One message more that could not be read; how many that makes."""
        self.note(refused=self._latest.refused + 1)
        return self._latest.refused
