"""How long messages of ranks take: stated for links that are known, or as measured between ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log2

import msgspec

from ..config import choose
from ..distributed.journal import Kind
from ..errors import ConfigError

MEASURED, LOOPBACK = "measured", "loopback"


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one kind of message: `base` seconds, `round` seconds for each time that ranks wait for each other, bytes a second."""

    base: float
    round: float
    bandwidth: float


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What messages between ranks cost.

    Args:
        speed: of all kinds but those in `kinds`.
        taken: the share of a message's bytes' time that its ranks can't compute in: 1 where cores that compute also copy.
        call: seconds of Python for a message, on ranks that launch ahead of a GPU.
    """

    name: str
    speed: Speed
    kinds: Mapping[str, Speed] = {}
    taken: float = 0.0
    call: float = 0.0

    def of(self, kind: Kind) -> Speed:
        return self.kinds.get("send" if kind == "receive" else kind, self.speed)

    def waits(self, kind: Kind, degree: int) -> float:
        """Seconds that a message takes however small it is."""
        speed = self.of(kind)
        return speed.base + speed.round * rounds(kind, degree)

    def carries(self, kind: Kind, nbytes: int) -> float:
        """Seconds that its bytes take."""
        return nbytes / self.of(kind).bandwidth


def rounds(kind: str, degree: int) -> int:
    """How often ranks wait for each other in one message: rings and trees, as NCCL and gloo have them."""
    turns = {"sum": 2 * (degree - 1), "gather": degree - 1, "broadcast": ceil(log2(max(degree, 2)))}
    return max(1, turns.get(kind, 1))


# Bandwidths are of one GPU, one way: the makers' peaks are 450, 300, 64, 32 and 12.5 GB/s, of which large messages reach about four
# fifths. The latencies are assumptions, of NCCL's kernels on each; `measured` takes the place of all.
_CALL = 50e-6
STATED: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link("nvlink4", Speed(10e-6, 1e-6, 360e9), call=_CALL),
        Link("nvlink3", Speed(12e-6, 1e-6, 235e9), call=_CALL),
        Link("pcie5", Speed(15e-6, 4e-6, 45e9), call=_CALL),
        Link("pcie4", Speed(15e-6, 4e-6, 22e9), call=_CALL),
        Link("100gbe", Speed(30e-6, 15e-6, 11e9), call=_CALL),
        # gloo over loopback TCP on a server's cores: 2 of them, measured by `doctor --links`.
        Link(LOOPBACK, Speed(0.0, 150e-6, 1.2e9), taken=1.0),
    )
}
NAMES = (*STATED, MEASURED)


def stated(name: str) -> Link:
    """Raises: ConfigError: no link of that name is known."""
    return STATED[choose(name, tuple(STATED), "Link")]


def from_times(times: Sequence[tuple[str, int, float]], degree: int, device: str) -> Link:
    """The link that ranks have measured between each other: a line through the least and the most bytes of each kind.

    Raises: ConfigError: nothing was measured.
    """
    if not times:
        raise ConfigError("One rank has no link to measure.", "Ask for a stated link, or on two devices or more.")
    kinds: dict[str, Speed] = {}
    on_cpu = device == "cpu"
    for kind in dict.fromkeys(kind for kind, _, _ in times):
        own = sorted((nbytes, seconds) for of, nbytes, seconds in times if of == kind)
        (few, least), (many, most) = own[0], own[-1]
        slope = max(1e-12, (most - least) / max(1, many - few))
        wait = max(0.0, least - slope * few)
        kinds[kind] = Speed(0.0 if on_cpu else wait, wait / rounds(kind, degree) if on_cpu else 0.0, 1 / slope)
    slowest = min(kinds.values(), key=lambda speed: speed.bandwidth)
    return Link(MEASURED, slowest, kinds, taken=1.0 if on_cpu else 0.0, call=0.0 if on_cpu else _CALL)
