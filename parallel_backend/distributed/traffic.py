"""What an axis costs: the bytes that this rank sends along it, and how long its computing stands still for others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .journal import NOBODY, Journal, Kind

# Rows of a timeline's table: kind, step, patch, start, end, bytes. Kinds above 0 are waits, those below are bytes sent, by
# the number of the axis.
COMPUTE = 0
COLUMNS = 6


@dataclass
class Timeline:
    """What one rank did in a job, in seconds of the machine's monotonic clock; asked for, since on a GPU every mark waits
    until all that was started has ended.

    Args:
        axes: of the mesh, in a fixed order, whose traffic is told apart.
    """

    axes: Sequence[Traffic]
    device: torch.device
    rows: list[tuple[float, ...]] = field(default_factory=list)
    step: int = -1
    patch: int = -1
    _sent: list[int] = field(default_factory=list)

    def __enter__(self) -> Timeline:
        self._sent = [traffic.sent_bytes for traffic in self.axes]
        for number, traffic in enumerate(self.axes, start=1):
            traffic.timeline, traffic.number = self, number
        return self

    def __exit__(self, *_: object) -> None:
        self.begin(-1)
        for traffic in self.axes:
            traffic.timeline = None

    def begin(self, step: int) -> None:
        """What follows belongs to this step."""
        now = [traffic.sent_bytes for traffic in self.axes]
        for number, (sent, before) in enumerate(zip(now, self._sent, strict=True), start=1):
            if sent > before and self.step >= 0:
                self.rows.append((-number, self.step, -1, 0.0, 0.0, sent - before))
        self.step, self._sent = step, now

    @contextmanager
    def span(self, kind: int = COMPUTE, patch: int | None = None) -> Iterator[None]:
        before, self.patch = self.patch, self.patch if patch is None else patch
        start = self._now()
        yield
        self.rows.append((kind, self.step, self.patch, start, self._now(), 0.0))
        self.patch = before

    def table(self) -> torch.Tensor:
        return torch.tensor(self.rows, dtype=torch.float64).view(-1, COLUMNS)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def with_ranks(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """All ranks' rows as one table, whose first column is the rank."""
    return torch.cat([F.pad(rows, (1, 0), value=float(rank)) for rank, rows in enumerate(tables)])


@dataclass
class Debt:
    """What a rank that fell out of a computation still owes the others: its part of every collective that they start after.

    It goes through the computation once more with tensors that have no values (the meta device), and gives zeros.

    Args:
        device: of the tensors that the others wait for.
        given: collectives that it had started before it fell.
    """

    device: torch.device
    given: int

    def is_given(self) -> bool:
        """Whether the next collective is one of those that this rank had started already."""
        self.given -= 1
        return self.given >= 0

    def zeros_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=x.dtype, device=self.device)


@dataclass
class Traffic:
    """A running count; the engine takes it before and after a job. `waited`: seconds of those waits that are timed.

    On a GPU the host runs ahead, and a wait is the computing stream's: to time each of hundreds in an evaluation costs the
    host milliseconds, so that there only waits of a timeline are timed. `collectives` are those that were started: ranks
    whose numbers are alike stand at the same place.
    """

    sent_bytes: int = 0
    collectives: int = 0
    waited: float = 0.0
    timeline: Timeline | None = None
    number: int = 0
    debt: Debt | None = None
    journal: Journal | None = None

    def count(self, nbytes: int, kind: Kind = "gather", peer: int = NOBODY) -> None:
        """A collective that sends so much starts; `kind` and `peer` as a journal has them."""
        self.sent_bytes += nbytes
        self.collectives += 1
        if self.journal is not None:
            self.journal.start(self, self.collectives, kind, nbytes, peer)

    def count_again(self, nbytes: int, collectives: int) -> None:
        """What was counted of an evaluation that runs once more, without Python."""
        self.sent_bytes += nbytes
        self.collectives += collectives

    @contextmanager
    def waiting(self, device: torch.device, message: int | None = None) -> Iterator[None]:
        """The block ends when what others send is there: of the collective of that number, or of the last that started."""
        if self.journal is not None:
            with self.journal.waiting(self, self.collectives if message is None else message):
                yield
            return
        if device.type != "cpu" and self.timeline is None:
            yield
            return
        start = time.perf_counter()
        with self.timeline.span(self.number) if self.timeline is not None else nullcontext():
            yield
        self.waited += time.perf_counter() - start
