"""What was predicted of each mesh, and which is the fastest of as many ranks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from ..config import MeshSpec
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

    @property
    def computing(self) -> float:
        return max(0.0, self.step - self.exposed - (self.launching or 0.0))


def predicted(run: Run, played: Sequence[Played], link: Link) -> Predicted:
    """The median step of those that count, on the rank that tells of steps.

    A rank that launches ahead of a GPU may be slower than the GPU: then Python's time and that of its messages count.
    """
    journals = [rank.entries for rank in played]
    schedule = Replay(run.mesh, journals, link).schedule()
    ends, computed = schedule.steps[0], schedule.computed[0]
    own = _after(ends, run.counted)
    step, computing = statistics.median(own), statistics.median(_after(computed, run.counted))
    counts = [_steps_of(entries, run.counted) for entries in journals]
    messages = max(sum(e.what == "start" for e in steps) for steps in counts) // len(own)
    nbytes = max(sum(e.nbytes for e in steps) for steps in counts) // len(own)
    busy = max((rank.busy or 0.0) for rank in played)
    if not busy:
        return Predicted(run.mesh, step, max(0.0, step - computing), None, nbytes, messages)
    host = max(sum(e.host for e in steps) / len(own) for steps in counts) + messages * link.call
    whole = max(step, host)
    exposed = max(0.0, step - computing)
    return Predicted(run.mesh, whole, exposed, max(0.0, whole - exposed - busy), nbytes, messages)


def _after(ends: Sequence[float], first: int) -> list[float]:
    return [b - a for a, b in pairwise(ends[first - 1 :])]


def _steps_of(entries: Sequence[object], first: int) -> list[object]:
    """What follows the first `first` steps; of stages that don't tell of steps, their share of all."""
    raise NotImplementedError


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
            f"| {ranks} | {row.mesh.describe()}{mark} | {row.step:.4f} | {times} | {shares[0]:.0%} | {shares[1]:.0%} | "
            f"{launching} | {row.messages} | {row.nbytes / 1e6:.2f} |"
        )
    return "\n".join(lines)
