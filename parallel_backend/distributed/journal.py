"""What one rank did, as a list that can be played again: how long it computed, which messages it started, where it waited.

A journal of a rank whose messages take no time, and of the others of its mesh, is all that a schedule needs: see
bench/replay.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch

if TYPE_CHECKING:
    from .traffic import Traffic

# Who a message is between. gather, sum, exchange, broadcast: all ranks of the axis. ring: to the next, from the one before.
# send, receive: one rank and `peer`.
Kind = Literal["gather", "sum", "exchange", "broadcast", "ring", "send", "receive"]
NOBODY = -1


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank did next, after it had computed for `seconds` of its device, and `host` of Python's time.

    Args:
        what: a message starts, its result is needed, or a step of the sampler is done.
        axis, number: of the message; a rank numbers those of an axis as it starts them.
        nbytes: that this rank sends.
        peer: the axis rank that a send goes to, or a receive comes from.
    """

    what: Literal["start", "wait", "step"]
    seconds: float
    host: float
    axis: str = ""
    number: int = 0
    kind: Kind = "gather"
    nbytes: int = 0
    peer: int = NOBODY

    @property
    def message(self) -> tuple[str, str, int, int]:
        """All but the times and numbers: ranks that stand in for others start the same ones."""
        return self.axis, self.kind, self.nbytes, self.peer


class Journal:
    """Kept while it is entered, of the traffic of these axes by name.

    On a GPU times are those of events on the computing stream, which cost the host a few microseconds each; on a CPU the
    thread's own, so that other programs on its core don't count.
    """

    def __init__(self, axes: Mapping[str, Traffic], device: torch.device) -> None:
        self._axes, self._device = axes, device
        self._names = {id(traffic): name for name, traffic in axes.items()}
        self._notes: list[tuple[dict[str, Any], _Moment, _Moment]] = []
        self._begun = _Moment(device)

    def __enter__(self) -> Journal:
        for traffic in self._axes.values():
            traffic.journal = self
        self._begun = _Moment(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        for traffic in self._axes.values():
            traffic.journal = None

    def start(self, traffic: Traffic, number: int, kind: Kind, nbytes: int, peer: int) -> None:
        now, axis = _Moment(self._device), self._names[id(traffic)]
        told = {"what": "start", "axis": axis, "number": number, "kind": kind, "nbytes": nbytes, "peer": peer}
        self._notes.append((told, now, now))

    @contextmanager
    def waiting(self, traffic: Traffic, number: int) -> Iterator[None]:
        """The block ends when that message is there; its time is not computing."""
        before = _Moment(self._device)
        yield
        told = {"what": "wait", "axis": self._names[id(traffic)], "number": number}
        self._notes.append((told, before, _Moment(self._device)))

    def step(self) -> None:
        now = _Moment(self._device)
        self._notes.append(({"what": "step"}, now, now))

    def entries(self) -> list[Entry]:
        """All of it so far. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found, last = [], self._begun
        for told, begun, ended in self._notes:
            found.append(Entry(seconds=begun.after(last), host=max(0.0, begun.host - last.host), **told))
            last = ended
        return found


class _Moment:
    """Now, on the device's computing stream and on the host."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self.host, self._computed = time.perf_counter(), time.thread_time()

    def after(self, earlier: _Moment) -> float:
        if self._event is None or earlier._event is None:
            return max(0.0, self._computed - earlier._computed)
        return max(0.0, earlier._event.elapsed_time(self._event) / 1000)
