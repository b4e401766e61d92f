"""In what a running backend is other than one that would be started now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import BackendSpec
from ..errors import ConfigError
from ..rpc.own_code import LOADED, code_hash
from ..rpc.runtime_dir import BackendRecord
from ..version import __version__
from .cards import seen
from .gpu_environment import said, unlike


@dataclass(frozen=True)
class Difference:
    """`there`: what the backend has; `asked`: what it would have. One that is not `binding` leaves it of use as it is."""

    there: str
    asked: str
    binding: bool = True

    def __str__(self) -> str:
        return f"{self.there}, {self.asked}"


def differences(record: BackendRecord, spec: BackendSpec) -> list[Difference]:
    """Empty where it is what `spec` asks for; idle time and memory budget can be changed in a running one, and don't count.

    Raises: ConfigError: it is of a version that was installed after this process has loaded its own.
    """
    found = [*_ranks(record, spec), *_code(record)]
    cards = [card.uuid for card in seen().cards] if record.device == "cuda" else []
    if other := unlike(record, os.environ, cards):
        there = ", ".join(said(name, record.environment) for name in other)
        found.append(Difference(there, f"here {', '.join(said(name, os.environ) for name in other)}", binding=False))
    return found


def _ranks(record: BackendRecord, spec: BackendSpec) -> list[Difference]:
    devices, verb = list(spec.devices), "is" if spec.world_size == 1 else "are"
    cards = seen().uuids(devices or range(spec.world_size)) if spec.device == "cuda" and any(record.cards) else []
    # A number is another card to a process that sees others.
    wanted, there = (sorted(cards), sorted(record.cards)) if cards else (devices, record.devices)
    ranks = f"{record.world_size} rank{'s' * (record.world_size != 1)}"
    if (record.device, there) == (spec.device, wanted):
        same = record.world_size == spec.world_size
        return [] if same else [Difference(ranks, f"{spec.world_size} {verb} asked for")]
    place = _place(spec.device, devices, cards)
    on = f"{ranks} on {_place(record.device, record.devices, record.cards)}"
    return [Difference(on, f"{spec.world_size} on {place} {verb} asked for")]


def _code(record: BackendRecord) -> list[Difference]:
    """Nothing where this process itself is what is old: it goes on with the code that it has loaded, as long as versions agree."""
    if (record.version, record.code) == (__version__, LOADED):
        return []
    is_newer = record.code == code_hash() != LOADED
    if record.version == __version__:
        return [] if is_newer else [Difference("other code of this pack", "than lies here")]
    if is_newer:
        raise ConfigError(
            f"The pack was updated to version {record.version}; this process runs version {__version__}.",
            "Start ComfyUI, or what else this is, again.",
        )
    return [Difference(f"version {record.version}", f"this is {__version__}")]


def _place(device: str, devices: Sequence[int], cards: Sequence[str]) -> str:
    uuids = ", ".join(filter(None, cards))
    return f"{device} {','.join(map(str, devices))}".strip() + (f" ({uuids})" if uuids else "")
