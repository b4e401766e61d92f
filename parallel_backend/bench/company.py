"""What other processes of this machine took of its cores meanwhile: times that were taken in company say little."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

# The share of all cores that others may take of a time that counts.
QUIET = 0.1


class Company:
    """From now on. This process, all that it has started, and the processes `ours` are no company."""

    def __init__(self, cores: int, ours: Collection[int] = ()) -> None:
        self._cores, self._ours = cores, ours
        self._since, self._before = time.monotonic(), _others(ours)

    @property
    def share(self) -> float:
        """Of the cores, taken by others since this was made."""
        used = sum(max(0.0, now - self._before.get(process, 0.0)) for process, now in _others(self._ours).items())
        return used / max(1e-3, time.monotonic() - self._since) / self._cores


def _others(ours_too: Collection[int]) -> dict[tuple[int, int], float]:
    """Seconds of CPU time of each other process, by its number and start."""
    found, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rsplit(")", 1)[1].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            found[pid, int(fields[19])] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid(), *ours_too}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return {process: spent for process, spent in found.items() if process[0] not in ours}
