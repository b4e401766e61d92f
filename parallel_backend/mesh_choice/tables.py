"""Seconds of a step by mesh, as `parallel-mmdit bench predict --write-defaults` has written them into tables.json."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from ..config import MeshSpec
from ..errors import ConfigError

FILE = Path(__file__).with_name("tables.json")


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fastest mesh of its number of ranks: degrees above 1, and seconds of a step."""

    degrees: dict[str, int]
    step: float

    @property
    def mesh(self) -> MeshSpec:
        return MeshSpec(**self.degrees)  # type: ignore[arg-type]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was predicted for one kind of model on one kind of device.

    Args:
        device: cuda or cpu. `basis` says which, and where the figures come from.
        kind: mmdit or unet. `layout` is the model's whose figures these are.
        graphs: evaluations are CUDA graphs.
        size: pixels.
    """

    device: str
    kind: str
    graphs: bool
    size: int
    layout: str
    basis: str
    rows: list[Row]


@cache
def shipped() -> tuple[Table, ...]:
    """The tables of this package."""
    return tuple(read(FILE))


def read(file: Path) -> list[Table]:
    """Raises: ConfigError: not a file of tables."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[Table])
    except (OSError, msgspec.DecodeError) as error:
        remedy = "Write it with `parallel-mmdit bench predict --write-defaults`."
        raise ConfigError(f"{file} holds no tables of meshes: {error}.", remedy) from error


def write(file: Path, tables: Sequence[Table]) -> None:
    """These are in the file, in place of those that it had of the same devices, kinds and sizes; the others stay."""

    def place(table: Table) -> tuple[str, str, bool, int]:
        return table.device, table.kind, table.graphs, table.size

    known = {place(table): table for table in (read(file) if file.exists() else [])}
    known |= {place(table): table for table in tables}
    ordered = [known[key] for key in sorted(known)]
    file.write_bytes(msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")
