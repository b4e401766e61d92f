"""NCCL's rules, played over what all ranks have recorded.

Everything that happens is a node, everything that it must wait for an edge: ranks stand still for ever where there is a
circle, or an edge to what never comes.
- A host makes its calls one after the other.
- A communicator is made at its first call, and then all its members' hosts stand until each has come to that call.
- A communicator does its calls first in, first out, on each rank.
- A call starts after all that the computing stream had in line before it. It ends when all its members have started it; a
  message, when its other end has; a batch, when all its messages have.
- A wait puts the end of a call in the computing stream's line. A call on the computing stream is such a wait by itself.
- gloo, for tensors on the CPU, has no communicators to make and no line; there a wait holds the host.
Source: ProcessGroupNCCL.cpp (`collective`, `pointToPoint`, `initNCCLComm`, `getKeySendRecv`) of torch 2.9 or later, without
device_id, that is with communicators that are made lazily. 2.13's own was not read; its Python side is the same. A send is
held to end no earlier than its receive has started, which is so of all but the smallest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .trace import Call, Trace, Wait

Node = tuple[object, ...]


@dataclass(frozen=True)
class Rules:
    """What may hold a rank up beyond the rules above. Each only adds edges: what passes under all passes without.

    Args:
        host_waits: the host waits for the computing stream wherever that waits: as if each call were followed by `.item()`.
        creation_drains: a communicator is made only after the rank's device has done all that it was given.
        one_queue: calls start in the order of their launch, whatever their streams (CUDA_DEVICE_MAX_CONNECTIONS=1).
    """

    host_waits: bool = True
    creation_drains: bool = True
    one_queue: bool = True


PLAIN = Rules(False, False, False)
STRICTEST = Rules()


def faults(traces: Sequence[Trace], rules: Rules = STRICTEST) -> list[str]:
    """What is wrong with these ranks' calls, in words; nothing where all of them come to their end."""
    return [*_unequal(traces), *_unmatched(traces), *_Play(traces, rules).standstill()]


def calls(trace: Trace) -> Iterator[tuple[int, Call]]:
    for number, entry in enumerate(trace):
        if isinstance(entry, Call):
            yield number, entry


# -- what must be alike on all members ----------------------------------------------------------------------------


def _unequal(traces: Sequence[Trace]) -> Iterator[str]:
    """The first difference of each communicator's collectives."""
    lines: dict[tuple[str, bool], dict[int, list[Call]]] = defaultdict(lambda: defaultdict(list))
    for rank, trace in enumerate(traces):
        for _, call in calls(trace):
            if not call.is_message:
                for member in call.ranks:
                    lines[call.group, call.on_host].setdefault(member, [])
                lines[call.group, call.on_host][rank].append(call)
    for (group, _), by_rank in lines.items():
        (first, expected), *others = sorted(by_rank.items())
        for rank, found in others:
            where = next((i for i, pair in enumerate(zip(expected, found)) if not _alike(*pair)), None)
            if where is None and len(expected) != len(found):
                where = min(len(expected), len(found))
            if where is not None:
                told = [line[where].told() if where < len(line) else "no more" for line in (expected, found)]
                yield f"{group}: collective {where} is, on rank {first}, {told[0]}; on rank {rank}, {told[1]}"


def _alike(one: Call, other: Call) -> bool:
    return (one.what, one.nbytes, one.root) == (other.what, other.nbytes, other.root)


def _unmatched(traces: Sequence[Trace]) -> Iterator[str]:
    """The first message of each pair, either way, that has no other end of the same size."""
    sent, received = (defaultdict(list) for _ in range(2))
    for rank, trace in enumerate(traces):
        for _, call in calls(trace):
            line = call.communicator(rank), call.what == "batch", call.on_host
            for peer, nbytes in call.sends:
                sent[(*line, rank, peer)].append(nbytes)
            for peer, nbytes in call.receives:
                received[(*line, peer, rank)].append(nbytes)
    for key in dict.fromkeys([*sent, *received]):
        if sent[key] != received[key]:
            there, here = sent[key], received[key]
            where = next(
                (i for i, pair in enumerate(zip(there, here)) if pair[0] != pair[1]), min(len(there), len(here))
            )
            one, other = (f"{line[where]} B" if where < len(line) else "nothing" for line in (there, here))
            name, *_, source, to = key
            yield f"{name}: message {where} from {source} to {to}: {one} is sent, {other} is received"


# -- who waits for whom -------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """Where one rank stands while its calls are laid out."""

    host: list[Node] = field(default_factory=list)
    stream: list[Node] = field(default_factory=list)
    started: Node | None = None
    ended: list[Node] = field(default_factory=list)
    last_of: dict[str, Node] = field(default_factory=dict)


class _Play:
    """Nodes by name, and what each waits for: ("starts" or "ends", rank, call), ("has come to" or "has", rank, communicator)."""

    def __init__(self, traces: Sequence[Trace], rules: Rules) -> None:
        self._traces, self._rules = traces, rules
        self._after: dict[Node, list[Node]] = {}
        self._partners = _partners(traces)
        for rank, trace in enumerate(traces):
            self._lay_out(rank, trace)

    def _lay_out(self, rank: int, trace: Trace) -> None:
        at = _Rank()
        for number, entry in enumerate(trace):
            if isinstance(entry, Call):
                self._lay_out_call(at, rank, number, entry)
            else:
                self._lay_out_wait(at, rank, number, entry)

    def _lay_out_call(self, at: _Rank, rank: int, number: int, call: Call) -> None:
        starts, ends = ("starts", rank, number), ("ends", rank, number)
        if not call.on_host:
            self._make_communicator(at, rank, call)
        self._after[starts] = list(at.host)
        self._after[ends] = [starts, *self._partners[rank, number]]
        if call.on_host:
            if not call.on_own_stream:
                at.host = [ends]
            return
        name = call.communicator(rank)
        self._after[starts] += at.stream
        if name in at.last_of:
            self._after[starts].append(at.last_of[name])
        if self._rules.one_queue and at.started is not None:
            self._after[starts].append(at.started)
        at.last_of[name], at.started = ends, starts
        at.ended.append(ends)
        if not call.on_own_stream:
            self._stream_stands_for(at, ends)

    def _make_communicator(self, at: _Rank, rank: int, call: Call) -> None:
        name = call.communicator(rank)
        if name in at.last_of:
            return
        comes, has = ("has come to", rank, name), ("has", rank, name)
        self._after[comes] = [*at.host, *(at.ended if self._rules.creation_drains else ())]
        self._after[has] = [("has come to", member, name) for member in call.members(rank)]
        at.host = [has]

    def _lay_out_wait(self, at: _Rank, rank: int, number: int, wait: Wait) -> None:
        call, passed = self._traces[rank][wait.of], ("passes its wait", rank, number)
        assert isinstance(call, Call)
        self._after[passed] = [*at.host, ("ends", rank, wait.of)]
        if call.on_host:
            at.host = [passed]
        else:
            self._after[passed] += at.stream
            self._stream_stands_for(at, passed)

    def _stream_stands_for(self, at: _Rank, node: Node) -> None:
        at.stream = [node]
        if self._rules.host_waits:
            at.host = [node]

    def standstill(self) -> list[str]:
        """Who waits for whom in a circle, or for what never comes."""
        left = self._never_happen()
        if not left:
            return []
        chain = [next(iter(left))]
        while True:
            following = next(n for n in self._after.get(chain[-1], ()) if n in left or n not in self._after)
            if following not in self._after:
                return [" <- ".join([f"never: {self._told(following)}", *map(self._told, reversed(chain))])]
            if following in chain:
                circle = chain[chain.index(following) :]
                return ["a circle: " + ", which waits until ".join(map(self._told, [*circle, following]))]
            chain.append(following)

    def _never_happen(self) -> dict[Node, None]:
        """What is left when all has happened that can."""
        missing = {node: len(after) for node, after in self._after.items()}
        before: dict[Node, list[Node]] = defaultdict(list)
        for node, after in self._after.items():
            for other in after:
                before[other].append(node)
        ready = [node for node, count in missing.items() if count == 0]
        while ready:
            node = ready.pop()
            del missing[node]
            for other in before[node]:
                missing[other] -= 1
                if missing[other] == 0:
                    ready.append(other)
        return dict.fromkeys(missing)

    def _told(self, node: Node) -> str:
        what, rank, which = node
        if isinstance(which, str):  # a communicator, or a call that was never made
            return f"rank {rank} {what} {'the making of ' * (what == 'has come to')}{which}"
        entry = self._traces[rank][which]  # type: ignore[index]
        call = self._traces[rank][entry.of] if isinstance(entry, Wait) else entry  # type: ignore[index]
        assert isinstance(call, Call)
        return f"rank {rank} {what} {which}: {call.told()}"


def _partners(traces: Sequence[Trace]) -> dict[tuple[int, int], list[Node]]:
    """For each call of each rank, the starts of the others that it can't end without."""
    lines: dict[Node, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    wanted: list[tuple[tuple[int, int], Node, int, list[int]]] = []
    for rank, trace in enumerate(traces):
        for number, call in calls(trace):
            line = call.communicator(rank), call.what == "batch", call.on_host
            if not call.is_message:
                keys = [(line, [member for member in call.ranks if member != rank])]
            else:
                keys = [((*line, rank, peer), [peer]) for peer, _ in call.sends]
                keys += [((*line, peer, rank), [peer]) for peer, _ in call.receives]
            for key, others in keys:
                wanted.append(((rank, number), key, len(lines[key][rank]), others))
                lines[key][rank].append(number)
    found: dict[tuple[int, int], list[Node]] = defaultdict(list)
    for place, key, turn, others in wanted:
        for other in others:
            theirs = lines[key][other]
            there = theirs[turn] if turn < len(theirs) else f"its number {turn} on {key[0]}"
            found[place].append(("starts", other, there))
    return found
