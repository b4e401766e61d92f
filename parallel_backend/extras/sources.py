"""Rows of an evaluation that take from others, and where these are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from ..errors import InputError
from ..models.extra import Extra, Row
from ..models.spread import UNKNOWN, Spread, chosen

SourceOf = Mapping[Row, Row]
F = TypeVar("F", bound="FromSources")


def source_of(rows: Sequence[Row], sources: Sequence[Row], what: str) -> SourceOf:
    """By row. Raises: InputError: not one for each row, or rows that come twice, or a source that is none of them or has another."""
    found = dict(zip(rows, sources, strict=False))
    if len(rows) != len(sources) or len(found) != len(rows):
        raise InputError(
            f"{len(sources)} sources came for {len(rows)} rows of {what}.", "Name each row once, and one source of it."
        )
    if odd := [row for row in sources if found.get(row) != row]:
        raise InputError(
            f"{what[0].upper()}{what[1:]} names the row {odd[0]} as a source, which is no source of its own.",
            "Name rows (prompt, latent) of the evaluation that look at themselves alone.",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class FromSources(Extra):
    """What gives each row something of another one. `sources`: of each, the row that it takes from."""

    sources: SourceOf
    spread: Spread = UNKNOWN
    pairs = True
    across_batch = True

    def check(self, branches: Iterable[int]) -> None:
        """Raises: InputError: rows of prompts that are not evaluated."""
        if unknown := {branch for branch, _ in self.sources} - set(branches):
            raise InputError(
                f"{self.name[0].upper()}{self.name[1:]} names rows of the prompts {sorted(unknown)}, which are not evaluated.",
                "Name those of the evaluation.",
            )

    def among(self: F, spread: Spread) -> F:
        return replace(self, spread=spread)

    @property
    def own_rows(self) -> tuple[Row, ...]:
        """This rank's."""
        return self.spread.rows[self.spread.own.start : self.spread.own.stop]


@dataclass(frozen=True)
class Sources:
    """All sources of an evaluation, in the order of its rows.

    Args:
        spread: where they are. own: which of this rank's rows are some.
    """

    rows: tuple[Row, ...]
    spread: Spread
    own: tuple[int, ...]

    @classmethod
    def of(cls, source_of: SourceOf, spread: Spread, what: str) -> Sources:
        """Raises: InputError: a row of the evaluation that has none, or one that is not evaluated with it."""
        if odd := [row for row in spread.rows if source_of.get(row) not in spread.rows]:
            raise InputError(
                f"{what[0].upper()}{what[1:]} has no source for the row {odd[0]} (prompt, latent) of this evaluation.",
                "Name all rows, and evaluate them at once: prompts of one length, with the same ControlNets.",
            )
        wanted = {source_of[row] for row in spread.rows}
        numbers = [number for number, row in enumerate(spread.rows) if row in wanted]
        own = tuple(number - spread.own.start for number in numbers if number in spread.own)
        return cls(tuple(spread.rows[number] for number in numbers), spread.only(numbers), own)

    def numbers(self, rows: Iterable[Row]) -> list[int]:
        """Of rows that are sources, their numbers among all of them."""
        return [self.rows.index(row) for row in rows]

    def gather(self, x_B: Tensor) -> Tensor:
        """That of all sources, of this rank's rows. Comm: all-gathers of the sources' part to the ranks of all rows."""
        return self.spread.gather(chosen(x_B, self.own))
