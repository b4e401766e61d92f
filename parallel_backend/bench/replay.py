"""The schedule of all ranks of a mesh, played again from what each did alone: when messages arrive and who waits for whom.

Each rank goes through its journal. A message is under way once all whom it needs have started it, after those that the rank
sent before along the same line; what is computed meanwhile hides it. So what the code overlaps is overlapped here, stages wait
for stages, and patches flow through them, by nothing but the order of starts and waits in the journals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import MeshSpec
from ..distributed.journal import Entry
from ..errors import ConfigError
from .links import Link

# What is awaited of another rank: the axis, who starts it, what it is, and the how-manieth of these.
_Key = tuple[str, int, str, int]


@dataclass(frozen=True)
class Schedule:
    """When each rank was done with each step, in seconds from the start, and how long it had computed by then."""

    steps: list[list[float]]
    computed: list[list[float]]


@dataclass
class _Pending:
    entry: Entry
    needs: list[_Key]
    line: tuple[str, str, int]
    started: float


@dataclass
class _Rank:
    number: int
    entries: Sequence[Entry]
    at: int = 0
    now: float = 0.0
    computed: float = 0.0
    steps: list[float] = field(default_factory=list)
    computed_steps: list[float] = field(default_factory=list)
    counts: dict[tuple[str, str, int], int] = field(default_factory=dict)
    pending: list[_Pending] = field(default_factory=list)
    free: dict[tuple[str, str, int], float] = field(default_factory=dict)
    arrived: dict[tuple[str, int], float] = field(default_factory=dict)


class Replay:
    """One mesh, its ranks' journals in the order of ranks, and the link between them."""

    def __init__(self, mesh: MeshSpec, journals: Sequence[Sequence[Entry]], link: Link) -> None:
        """Raises: ConfigError: as many journals as ranks are needed."""
        mesh.check_world(len(journals))
        self._link = link
        self._ranks = [_Rank(number, entries) for number, entries in enumerate(journals)]
        self._members = _members(mesh)
        self._started: dict[_Key, tuple[float, int]] = {}

    def schedule(self) -> Schedule:
        """Raises: ConfigError: the journals are not of one run, and a rank waits for ever."""
        while any(rank.at < len(rank.entries) for rank in self._ranks):
            before = sum(rank.at for rank in self._ranks)
            for rank in self._ranks:
                while rank.at < len(rank.entries) and self._take(rank, rank.entries[rank.at]):
                    rank.at += 1
            if sum(rank.at for rank in self._ranks) == before:
                stuck = next(rank for rank in self._ranks if rank.at < len(rank.entries))
                entry = stuck.entries[stuck.at]
                raise ConfigError(
                    f"Rank {stuck.number} waits for message {entry.number} over {entry.axis}, which nobody sends.",
                    "Give the journals of all ranks of one run.",
                )
        return Schedule([rank.steps for rank in self._ranks], [rank.computed_steps for rank in self._ranks])

    def _take(self, rank: _Rank, entry: Entry) -> bool:
        """Whether the rank is past this entry; it is not while it waits for what another one has not started."""
        if entry.what == "wait":
            arrival = self._arrival(rank, entry)
            if arrival is None:
                return False
            rank.now, rank.computed = max(rank.now + entry.seconds, arrival), rank.computed + entry.seconds
            return True
        rank.now, rank.computed = rank.now + entry.seconds, rank.computed + entry.seconds
        if entry.what == "step":
            rank.steps.append(rank.now)
            rank.computed_steps.append(rank.computed)
        else:
            self._start(rank, entry)
        return True

    def _start(self, rank: _Rank, entry: Entry) -> None:
        degree, place, members = self._place(rank, entry.axis)
        line = (entry.axis, entry.kind, entry.peer)
        count = rank.counts[line] = rank.counts.get(line, 0) + 1
        # Ranks that copy what they send compute nothing meanwhile.
        rank.now += self._link.taken * self._link.carries(entry.kind, entry.nbytes)

        def key(member: int, kind: str, to: int = -1) -> _Key:
            return entry.axis, members[member], f"{kind}{to}", count

        if entry.kind == "ring":
            needs = [key((place - 1) % degree, "ring")]
        elif entry.kind in ("send", "receive"):
            needs = [key(entry.peer, "receive" if entry.kind == "send" else "send", place)]
        else:
            needs = [key(other, entry.kind) for other in range(degree) if other != place]
        self._started[key(place, entry.kind, entry.peer)] = (rank.now, entry.nbytes)
        rank.pending.append(_Pending(entry, needs, line, rank.now))

    def _arrival(self, rank: _Rank, wait: Entry) -> float | None:
        """When that message is there; None while one that it needs has not started."""
        if (wait.axis, wait.number) in rank.arrived:
            return rank.arrived[wait.axis, wait.number]
        wanted = next(p for p in rank.pending if (p.entry.axis, p.entry.number) == (wait.axis, wait.number))
        before = [p for p in rank.pending[: rank.pending.index(wanted)] if p.line == wanted.line]
        for pending in [*before, wanted]:
            if any(need not in self._started for need in pending.needs):
                return None
            entry, others = pending.entry, [self._started[need] for need in pending.needs]
            ready = max([pending.started, rank.free.get(pending.line, 0.0), *(time for time, _ in others)])
            nbytes = max([entry.nbytes, *(sent for _, sent in others)])
            carried = self._link.carries(entry.kind, nbytes) * (1 - self._link.taken)
            arrival = ready + self._link.waits(entry.kind, self._place(rank, entry.axis)[0]) + carried
            rank.free[pending.line] = rank.arrived[entry.axis, entry.number] = arrival
            rank.pending.remove(pending)
        return rank.arrived[wait.axis, wait.number]

    def _place(self, rank: _Rank, axis: str) -> tuple[int, int, list[int]]:
        members = self._members[axis][rank.number]
        return len(members), members.index(rank.number), members


def _members(mesh: MeshSpec) -> Mapping[str, Mapping[int, list[int]]]:
    """By axis and rank, the ranks of its group."""
    groups = {axis: mesh.groups(axis) for axis in mesh.degrees} | {"weights": mesh.groups("cfg", "patch")}
    return {axis: {rank: group for group in of for rank in group} for axis, of in groups.items()}
