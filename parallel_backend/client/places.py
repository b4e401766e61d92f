"""Where a backend is: on this machine, found by its runtime folder, or behind an address, known by its keys."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Protocol

import zmq

from ..config import BackendSpec
from ..errors import BackendLostError, ConfigError, StartError
from ..rpc import runtime_dir as files
from ..rpc.keys import Keys
from ..rpc.messages import Adjust, Welcome
from ..rpc.runtime_dir import BackendRecord
from . import launcher

RECONNECT_SECONDS = 90.0
# With less, ranks can't leave their last words.
FULL_BYTES = 64 * 2**10


class Place(Protocol):
    """What a connection asks of where its backend is."""

    @property
    def notes(self) -> list[str]:
        """What its user should know of how it came to be as it is; who has told that empties it."""

    @property
    def asks(self) -> bool:
        """Whether it is to be as the spec says, and may be started or restarted for that; else it is taken as it is."""

    @property
    def settings(self) -> Adjust:
        """What a running one is to take over."""

    def fits(self, record: BackendRecord) -> bool:
        """Whether that one is known to be as asked for."""

    def current(self) -> BackendRecord | None:
        """The one that runs; None where it can't be known, or none does."""

    def next(self, last: BackendRecord, waiting: launcher.Waiting, start: bool) -> BackendRecord:
        """The one to connect to after `last` was lost.

        Args:
            waiting: called now and then with the seconds passed; what it raises ends the wait.
            start: where none runs any more.
        Raises: StartError: none runs, and none is to be started.
        """
        ...

    def connect(self, socket: zmq.Socket[bytes], record: BackendRecord) -> None: ...

    def met(self, record: BackendRecord, welcome: Welcome) -> BackendRecord | None:
        """The record as its backend has confirmed it; None where another one answered."""

    def check(self, record: BackendRecord, since: float) -> None:
        """Raises: BackendLostError: the ranks of that record are no more."""

    def lost(self, record: BackendRecord, seconds: float | None) -> BackendLostError:
        """What to raise where nothing was heard for so long; without seconds, where the request is not known there."""


class ThisMachine:
    """A backend of this user, started where none runs.

    Args:
        settings: that a running one takes over.
        found: one that is known to be as the spec says.
        as_it_is: whatever ranks it has; a running one is never restarted.
    """

    def __init__(
        self,
        spec: BackendSpec,
        settings: Adjust = Adjust(),  # noqa: B008 - frozen
        *,
        found: BackendRecord | None = None,
        as_it_is: bool = False,
    ) -> None:
        self._spec, self.settings, self.asks = spec, settings, not as_it_is
        self._falls_seen = 0
        self._fitting = "" if found is None else found.generation
        self.notes: list[str] = []

    def first(self, waiting: launcher.Waiting) -> BackendRecord:
        """Raises: as `launcher.attach_or_start`."""
        record = launcher.attach_or_start(self._spec, waiting, tell=self.notes.append)
        self._fitting = record.generation
        return record

    def fits(self, record: BackendRecord) -> bool:
        return not self.asks or record.generation == self._fitting

    def current(self) -> BackendRecord | None:
        return files.read_record(self._spec.name)

    def next(self, last: BackendRecord, waiting: launcher.Waiting, start: bool) -> BackendRecord:
        """Raises: StartError, ConfigError, BackendInUseError."""
        record, begun = self.current(), time.monotonic()
        while record is None and time.monotonic() < begun + RECONNECT_SECONDS and files.is_alive(last.agent_pid):
            waiting(time.monotonic() - begun, "its ranks are being started anew")
            time.sleep(0.1)  # its torchrun lives, and brings the ranks back
            record = self.current()
        if record is None and not start:
            raise StartError(f"Backend {self._spec.name!r} has ended.", "The next prompt starts it again.")
        if record is not None and not (start and self.asks):
            return record
        return self.first(waiting)

    def connect(self, socket: zmq.Socket[bytes], record: BackendRecord) -> None:
        self._falls_seen = len(files.fallen_ranks(self._spec.name))
        socket.connect(record.address)

    def met(self, record: BackendRecord, welcome: Welcome) -> BackendRecord | None:
        return record if welcome.generation == record.generation else None

    def check(self, record: BackendRecord, since: float) -> None:
        now = self.current()
        if now is None and files.lives(record.pid, record.start_ticks):
            return  # its record was removed, and is about to be put back
        if now is None or now.generation != record.generation:
            raise self._error(f"was lost in the middle of a request: {self._what_happened(since)}")

    def lost(self, record: BackendRecord, seconds: float | None) -> BackendLostError:
        """A process that is stopped would never end: it is ended."""
        if seconds is None:
            return self._error("no longer knows the request: the connection was cut meanwhile")
        what = f"has not answered for {seconds:.0f} s"
        for role, pid in (("rank 0", record.pid), ("torchrun", record.agent_pid)):
            if files.is_stopped(pid):
                what += f"; its {role} (process {pid}) was stopped and is ended"
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self._error(what)

    def _error(self, what: str) -> BackendLostError:
        log = files.runtime_dir(self._spec.name) / "backend.log"
        return BackendLostError(
            f"The backend {self._spec.name!r} {what}.",
            f"Run the prompt again: what fell is started anew. The log is {log}.",
        )

    def _what_happened(self, since: float) -> str:
        """The word of torchrun on the rank that fell, which comes a moment later, and the ranks' own last words."""
        name, deadline = self._spec.name, time.monotonic() + 3.0
        while len(files.fallen_ranks(name)) <= self._falls_seen and time.monotonic() < deadline:
            time.sleep(0.1)
        words = [*files.fallen_ranks(name)[self._falls_seen :][:1], files.last_words(name, since)]
        if shutil.disk_usage(files.runtime_dir(name)).free < FULL_BYTES:
            words.append(f"the disk of {files.runtime_dir(name)} is full")
        return "; ".join(filter(None, words)) or "no rank left a message"


class Elsewhere:
    """A backend behind a tcp address. It can't be started from here, and what it knows is asked of it alone."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec, self._keys = spec, Keys(Path(spec.keys).expanduser())
        self.notes: list[str] = []
        self.settings, self.asks = Adjust(), False

    def fits(self, record: BackendRecord) -> bool:
        return True

    def first(self) -> BackendRecord:
        """What is known before it has answered."""
        return BackendRecord("", "", 0, 0, self._spec.address, self._spec.world_size, self._spec.device)

    def current(self) -> BackendRecord | None:
        return None

    def next(self, last: BackendRecord, waiting: launcher.Waiting, start: bool) -> BackendRecord:
        return last

    def connect(self, socket: zmq.Socket[bytes], record: BackendRecord) -> None:
        self._keys.identify(socket)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 8000)
        socket.connect(record.address)

    def met(self, record: BackendRecord, welcome: Welcome) -> BackendRecord | None:
        """Raises: ConfigError: it has other ranks than were asked for."""
        if self._spec.world_size not in (0, welcome.world_size):
            raise ConfigError(
                f"The backend at {record.address} has {welcome.world_size} ranks; {self._spec.world_size} were asked for.",
                f"Set ranks to {welcome.world_size}.",
            )
        return BackendRecord(
            record.version, welcome.generation, 0, 0, record.address, welcome.world_size, welcome.device
        )

    def check(self, record: BackendRecord, since: float) -> None:
        """Nothing of it can be seen from here."""

    def lost(self, record: BackendRecord, seconds: float | None) -> BackendLostError:
        if seconds is None:
            what = "no longer knows the request: its ranks were restarted, or the connection was cut"
        else:
            what = f"has not answered for {seconds:.0f} s"
        return BackendLostError(
            f"The backend at {record.address} {what}.",
            "See that it runs, that the link is up, and that the keys are its own; then run the prompt again.",
        )
