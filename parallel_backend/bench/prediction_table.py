"""What was predicted of each mesh, and which is the fastest of as many ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

from ..config import MeshSpec
from ..distributed.journal import Entry
from .links import Link
from .replay import Replay
from .stand_in import Played, Run


class Predicted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of a step of a mesh, and what they are made of.

    Args:
        exposed: for messages that nothing hides.
        launching: in which a GPU waits for Python; None where that is not known, on a CPU.
        nbytes, messages: that the busiest rank sends and takes part in.
    """

    mesh: MeshSpec
    step: float
    exposed: float
    launching: float | None
    nbytes: int
    messages: int
    displaced: bool = False

    @property
    def name(self) -> str:
        return self.mesh.describe() + ", displaced" * self.displaced

    @property
    def computing(self) -> float:
        return max(0.0, self.step - self.exposed - (self.launching or 0.0))


def predicted(run: Run, played: Sequence[Played], link: Link) -> Predicted:
    """The median step of those that count, on the rank that tells of steps.

    A rank that launches ahead of a GPU may be slower than the GPU: then Python's time and that of its messages count.
    """
    journals = [rank.entries for rank in played]
    schedule = Replay(run.mesh, journals, link).schedule()
    step = statistics.median(_lengths(schedule.steps[0], run.counted))
    exposed = max(0.0, step - statistics.median(_lengths(schedule.computed[0], run.counted)))
    costs = [_Cost.of(entries, run) for entries in journals]
    messages, nbytes = max(cost.messages for cost in costs), max(cost.nbytes for cost in costs)
    displaced = run.warmup is not None
    busy = max((rank.busy or 0.0) for rank in played)
    if not busy:
        return Predicted(run.mesh, step, exposed, None, round(nbytes), round(messages), displaced)
    whole = max(step, *(cost.host + cost.messages * link.call * (not run.graphs) for cost in costs))
    launching = max(0.0, whole - exposed - busy)
    return Predicted(run.mesh, whole, exposed, launching, round(nbytes), round(messages), displaced)


def median_of(rounds: Sequence[Predicted]) -> Predicted:
    """Of one mesh in several rounds, that with the median step; of an even number the faster of both."""
    return sorted(rounds, key=lambda row: row.step)[(len(rounds) - 1) // 2]


def _lengths(ends: Sequence[float], first: int) -> list[float]:
    """Of the steps after the first ones, of the times at which each was done."""
    return [b - a for a, b in pairwise(ends[first - 1 :])]


class _Cost(NamedTuple):
    """Of a step that counts, on one rank: the mean. Ranks of later stages tell of exact steps alone."""

    messages: float
    nbytes: float
    host: float

    @classmethod
    def of(cls, entries: Sequence[Entry], run: Run) -> _Cost:
        ends = [at + 1 for at, entry in enumerate(entries) if entry.what == "step"]
        skipped = min(run.counted, len(ends))
        stop = ends[-1] if len(ends) == run.steps else len(entries)
        own, steps = entries[ends[skipped - 1] : stop], run.steps - skipped
        started = [entry.nbytes for entry in own if entry.what == "start"]
        return cls(len(started) / steps, sum(started) / steps, sum(entry.host for entry in own) / steps)


def fastest(rows: Iterable[Predicted]) -> dict[int, Predicted]:
    """By number of ranks, the mesh with the shortest step."""
    best: dict[int, Predicted] = {}
    for row in rows:
        ranks = row.mesh.world_size
        if ranks not in best or row.step < best[ranks].step:
            best[ranks] = row
    return best


def table(rows: Sequence[Predicted], title: str) -> str:
    """A row for each mesh, the fastest of as many ranks marked."""
    best, alone = fastest(rows), next((row for row in rows if row.mesh.world_size == 1), None)
    lines = [
        title,
        "",
        "| ranks | mesh | s a step | times faster than one | computing | exposed messages | launching | messages | MB sent |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ranks = row.mesh.world_size
        mark = " **fastest**" if len([r for r in rows if r.mesh.world_size == ranks]) > 1 and best[ranks] is row else ""
        times = f"{alone.step / row.step:.2f}" if alone is not None else "-"
        shares = [row.computing / row.step, row.exposed / row.step]
        launching = "-" if row.launching is None else f"{row.launching / row.step:.0%}"
        lines.append(
            f"| {ranks} | {row.name}{mark} | {row.step:.4f} | {times} | {shares[0]:.0%} | {shares[1]:.0%} | "
            f"{launching} | {row.messages} | {row.nbytes / 1e6:.2f} |"
        )
    return "\n".join(lines)
