"""What a section tells: tables that grow row by row, and how they are shown. Knows nothing of torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

NO_GPU = "needs a GPU"
DONE = "done"
Value = str | float | int | None


class Report:
    """A section's line to the runner: one JSON object a line, flushed at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def table(self, title: str, *columns: str) -> None:
        """Rows that follow are of this table."""
        self._say({"table": title, "columns": columns})

    def row(self, *values: Value) -> None:
        self._say({"row": values})

    def note(self, text: str) -> None:
        self._say({"note": text})

    def attempt(self, what: str, measure: Callable[[], object]) -> None:
        """What fails is noted, and costs the rest of the section nothing."""
        try:
            measure()
        except Exception as error:  # noqa: BLE001 - on a machine that it meets for the first time it may be anything
            self.note(f"{what}: fails, {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")

    def done(self) -> None:
        """The section has come to its end, and what it leaves running may be killed."""
        self._say({"done": True})

    def _say(self, message: dict[str, Any]) -> None:
        self._stream.write(json.dumps(message) + "\n")
        self._stream.flush()


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Value]] = field(default_factory=list)


@dataclass
class Told:
    """What has come of one section so far, and how it ended."""

    name: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ended: str = ""
    seconds: float = 0.0

    def take(self, line: str) -> list[str]:
        """Keeps a line of the section's; returns what it reads as."""
        message = json.loads(line)
        if "table" in message:
            self.tables.append(Table(message["table"], message["columns"]))
            return ["", *heading(self.tables[-1])]
        if "row" in message:
            missing = len(self.tables[-1].columns) - len(message["row"])
            self.tables[-1].rows.append(message["row"] + [None] * missing)
            return [cells(self.tables[-1].rows[-1])]
        if "done" in message:
            self.ended = DONE
            return []
        self.notes.append(message["note"])
        return [f"- {message['note']}"]


def heading(table: Table) -> list[str]:
    return [f"{table.title}:", "", cells(table.columns), "|" + "---|" * len(table.columns)]


def cells(values: Sequence[Value]) -> str:
    return f"| {' | '.join(map(shown, values))} |"


def shown(value: Value) -> str:
    """A figure to three digits or so."""
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or value == 0 else f"{value:.1e}"


def summary(sections: Sequence[Told]) -> str:
    """All of it in Markdown, as benchmarks/RESULTS.md has its tables."""
    lines: list[str] = []
    for told in sections:
        lines += [f"### {told.name} ({told.seconds:.0f} s, {told.ended})", ""]
        for table in told.tables:
            lines += [*heading(table), *map(cells, table.rows), ""]
        lines += [*(f"- {note}" for note in told.notes), ""] if told.notes else []
    return "\n".join(lines)
