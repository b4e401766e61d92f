"""What an axis costs: the bytes that this rank sends along it, and how long its computing stands still for others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Traffic:
    """A running count; the engine takes it before and after a job.

    On a GPU the host runs ahead, so waits are measured there by events on the computing stream.
    """

    sent_bytes: int = 0
    _waited: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """The block ends when what others send is there."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._waited += time.perf_counter() - start
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    def waited(self) -> float:
        """Seconds of waiting so far. On a GPU this waits until the last event has passed."""
        if self._events:
            self._events[-1][1].synchronize()
            self._waited += sum(before.elapsed_time(after) for before, after in self._events) / 1000
            self._events.clear()
        return self._waited
