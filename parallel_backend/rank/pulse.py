"""Whether this rank's job moves, for those who look from outside the thread that runs it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch

# A job in which no rank moves for so long will not move any more; a compiler needs minutes in which nothing else moves.
STILL_SECONDS, COMPILING_SECONDS = 40.0, 300.0
# Of a processor, in which a rank on the CPU has computed something: threads that only wait take less in minutes.
_COMPUTED_SECONDS = 1.0
# Under way at once: a host runs a few hundred kernels ahead of its GPU, which is a few blocks.
_MOST_MARKS = 64


class Pulse:
    """What runs on this rank, and a number that grows while it moves.

    Moved has who starts a collective, a step, a block or a tensor of a file; whose device has come past a mark that was left
    there; and, on a CPU, who has used the processor.

    Args:
        collectives: how many this rank has started so far.
    """

    def __init__(self, device: torch.device, collectives: Callable[[], int]) -> None:
        self._device, self._collectives = device, collectives
        self.job, self.patience = "", STILL_SECONDS
        self.cancelled: Callable[[], bool] = lambda: False
        self._beats = self._computations = self._before = 0
        self._computed = 0.0
        self._marks = _Marks() if device.type == "cuda" else None

    def begin(self, job: str, cancelled: Callable[[], bool], patience: float = STILL_SECONDS) -> None:
        """`job` runs from now on; `patience` is how many seconds it may stand still."""
        self._before, self.cancelled, self.patience = self._collectives(), cancelled, patience
        self.job = job

    def end(self) -> None:
        self.job = ""

    def beat(self) -> None:
        """The job is at its next step, block or tensor."""
        self._beats += 1
        if self._marks is not None:
            self._marks.leave()

    @property
    def started(self) -> int:
        """How many collectives the job has started: the ranks with the fewest are likely those that are waited for."""
        return self._collectives() - self._before

    def moves(self) -> int:
        """Another number than at the last call where this rank has moved since; for one thread."""
        if self._device.type == "cpu" and (now := time.process_time()) - self._computed > _COMPUTED_SECONDS:
            self._computed, self._computations = now, self._computations + 1
        passed = self._marks.passed if self._marks is not None else 0
        return self._beats + self._computations + passed + self._collectives()


class _Marks(threading.Thread):
    """Counts the marks that the device has come past.

    It alone waits for the device: a call of CUDA may hold its thread, and with it whoever needs Python's lock, for as long as
    the device hangs. Waiting for an event lets go of that lock.
    """

    def __init__(self) -> None:
        super().__init__(name="marks", daemon=True)
        self.passed = 0
        self._idle: queue.SimpleQueue[torch.cuda.Event] = queue.SimpleQueue()
        self._under_way: queue.SimpleQueue[torch.cuda.Event] = queue.SimpleQueue()
        for _ in range(_MOST_MARKS):
            self._idle.put(torch.cuda.Event(blocking=True))
        self.start()

    def leave(self) -> None:
        """A mark behind all that the computing stream has been given; none where enough are under way, or where what it is given
        is only recorded."""
        if torch.cuda.is_current_stream_capturing():
            return
        with suppress(queue.Empty):
            mark = self._idle.get_nowait()
            mark.record()
            self._under_way.put(mark)

    def run(self) -> None:
        with suppress(RuntimeError):  # the device is lost: the thread that computes meets it too
            while True:
                mark = self._under_way.get()
                mark.synchronize()
                self.passed += 1
                self._idle.put(mark)
