"""Whether this rank's job moves, for those who look from outside the thread that runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

# A job in which no rank moves for so long will not move any more; a compiler needs minutes in which nothing else moves.
STILL_SECONDS, COMPILING_SECONDS = 40.0, 300.0
# Of a processor, in which a rank on the CPU has computed something: threads that only wait take less in minutes.
_COMPUTED_SECONDS = 1.0


class Pulse:
    """What runs on this rank, and a number that grows while it moves.

    Moved has who starts a collective, a step or a tensor of a file; whose device has come past a mark that was left at a
    step; and, on a CPU, who has used the processor.

    Args:
        collectives: how many this rank has started so far.
    """

    def __init__(self, device: torch.device, collectives: Callable[[], int]) -> None:
        self._device, self._collectives = device, collectives
        self.job, self.patience = "", STILL_SECONDS
        self.cancelled: Callable[[], bool] = lambda: False
        self._beats = self._device_moves = self._before = 0
        self._computed = 0.0
        self._mark: torch.cuda.Event | None = None

    def begin(self, job: str, cancelled: Callable[[], bool], patience: float = STILL_SECONDS) -> None:
        """`job` runs from now on; `patience` is how many seconds it may stand still."""
        self._before, self.cancelled, self.patience = self._collectives(), cancelled, patience
        self.job = job

    def end(self) -> None:
        self.job = ""

    def beat(self) -> None:
        """The job is at its next step, block or tensor."""
        self._beats += 1
        if self._device.type == "cuda" and self._mark is None:
            mark = torch.cuda.Event()
            mark.record()
            self._mark = mark

    @property
    def started(self) -> int:
        """How many collectives the job has started: the ranks with the fewest are likely those that are waited for."""
        return self._collectives() - self._before

    def moves(self) -> int:
        """Another number than at the last call where this rank has moved since; for one thread."""
        if (mark := self._mark) is not None:
            with suppress(RuntimeError):  # of the device: the thread that computes meets it too
                if mark.query():
                    self._mark, self._device_moves = None, self._device_moves + 1
        if self._device.type == "cpu" and (now := time.process_time()) - self._computed > _COMPUTED_SECONDS:
            self._computed, self._device_moves = now, self._device_moves + 1
        return self._beats + self._device_moves + self._collectives()
