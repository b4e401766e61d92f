"""What one rank asks of the others, call by call."""

from __future__ import annotations

from dataclasses import dataclass

# (the other rank, bytes), in the order of the call
Messages = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Call:
    """One collective, message or batch of messages that a rank puts in line.

    Args:
        group: its name, alike on every member.
        ranks: its members, by their numbers in the world.
        what: all_reduce, broadcast, ..., or send, receive, batch.
        nbytes: of a collective, whose members all give the same.
        root: of a collective that has one.
        sends, receives: of messages, a batch of them, or an all-to-all.
        on_host: of tensors on the CPU: gloo does it, and the host waits.
        on_own_stream: the computing stream goes on; else it stands until the call has ended.
    """

    group: str
    ranks: tuple[int, ...]
    what: str
    nbytes: int = 0
    root: int | None = None
    sends: Messages = ()
    receives: Messages = ()
    on_host: bool = False
    on_own_stream: bool = True

    @property
    def is_message(self) -> bool:
        """Whether it is between some members, and not a collective of all."""
        return self.what in ("send", "receive", "batch")

    def members(self, rank: int) -> tuple[int, ...]:
        """Of the communicator that NCCL has for this call of `rank`."""
        if self.what not in ("send", "receive"):
            return self.ranks
        ((peer, _),) = self.sends or self.receives
        return min(rank, peer), max(rank, peer)

    def communicator(self, rank: int) -> str:
        """Its name, alike on every member. Messages outside a batch have one for each pair of ranks, both ways in it."""
        if self.what in ("send", "receive"):
            return f"{self.group} between {' and '.join(map(str, self.members(rank)))}"
        return self.group

    def told(self) -> str:
        parts = [f"{n} B to {peer}" for peer, n in self.sends] + [f"{n} B from {peer}" for peer, n in self.receives]
        if not parts:
            parts = [f"{self.nbytes} B" + (f" of rank {self.root}" if self.root is not None else "")]
        return f"{self.what} {', '.join(parts)} on {self.group}{' by gloo' * self.on_host}"


@dataclass(frozen=True)
class Wait:
    """What is put in line after this comes after the end of call number `of`: on the computing stream, or on the host."""

    of: int


Trace = list[Call | Wait]
