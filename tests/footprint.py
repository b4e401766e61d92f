"""How long a run of the tests took, and how much memory all of its processes held at most."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

LOOK_SECONDS = 4.0
# In the environment of every process that a test starts, however far it has gone from this one.
_MARK = "PARALLEL_MMDIT_TESTS"
_HELD = re.compile(rb"^Pss:\s+(\d+) kB", re.M)


class Footprint(threading.Thread):
    """Looks at the run's processes now and then; memory that several of them share counts once."""

    def __init__(self) -> None:
        super().__init__(name="footprint", daemon=True)
        self.peak_bytes, self.most_processes, self.peak_test = 0, 0, "no test"
        self._begun, self._done = time.monotonic(), threading.Event()
        os.environ.setdefault(_MARK, str(os.getpid()))  # of the run that began this one, if any

    def run(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            held = [_held_bytes(process) for process in self._processes()]
            if sum(held) > self.peak_bytes:
                self.peak_bytes, self.peak_test = sum(held), os.environ.get("PYTEST_CURRENT_TEST", "no test")
            self.most_processes = max(self.most_processes, len(held))

    def told(self) -> str:
        """A line for the end of the run."""
        self._done.set()
        minutes = (time.monotonic() - self._begun) / 60
        held = f"at most {self.peak_bytes / 1e9:.1f} GB, in {self.peak_test}"
        return f"{minutes:.1f} minutes; {held}; up to {self.most_processes} processes"

    def _processes(self) -> list[Path]:
        mark = f"{_MARK}={os.environ[_MARK]}\0".encode()
        others = [p for p in Path("/proc").iterdir() if p.name.isdigit() and mark in _read(p / "environ") + b"\0"]
        return [Path("/proc/self"), *others]


def _held_bytes(process: Path) -> int:
    found = _HELD.search(_read(process / "smaps_rollup"))
    return int(found[1]) * 1024 if found else 0


def _read(path: Path) -> bytes:
    """Empty where the process has ended meanwhile, or is somebody else's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
