"""A workflow made parallel, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .check import Findings, Remark, check
from .graph import Node
from .insert import SWAPPED, SWAPPED_FOR, insert, swap
from .known import PARALLELIZE
from .reading import Workflow

NOTHING_TO_DO = "Not an SD3 or SDXL workflow: nothing to do."


@dataclass(frozen=True)
class Report:
    """`changed` has each loader whose MODEL was, or would be, made parallel."""

    found: Findings
    changed: tuple[Remark, ...]

    def lines(self) -> Iterator[str]:
        if not self.found.concerns_us:
            yield NOTHING_TO_DO
        for remarks in (self.changed, self.found.parallel, self.found.hidden, self.found.local):
            yield from map(str, remarks)
        yield from (f"Refused: {remark}" for remark in self.found.refused)
        yield from map(str, self.found.unknown)
        yield from self.found.notes
        if self.found.runs:
            yield "Runs."
        elif self.found.concerns_us:
            yield "Runs with that setting." if self.found.runs_with_setting else "Something in it would be refused."


def make_parallel(workflow: Workflow, *, swapped: bool = False, only_check: bool = False) -> Report:
    """Changes the workflow in its place, unless `only_check`; one that is parallel already stays as it is.

    Args:
        swapped: CheckpointLoaderSimple gives way to LoadParallelCheckpoint, in place of a node behind it.
    """
    found = check(workflow)
    changed = (
        Remark.of(loader, _change(workflow, loader, slot, swapped=swapped, only_check=only_check))
        for loader, slot in found.wanted
    )
    return Report(found, tuple(changed))


def _change(workflow: Workflow, loader: Node, slot: int, *, swapped: bool, only_check: bool) -> str:
    """What is done, or would be, in words."""
    file = f" ({loader.file})" if loader.file else ""
    if swapped and loader.class_type == SWAPPED:
        if not only_check:
            swap(loader)
        return f"{'would become' if only_check else 'became'} {SWAPPED_FOR}{file}"
    if only_check:
        return f"{PARALLELIZE} would be put behind it{file}"
    return f"{PARALLELIZE} put behind it as node {insert(workflow, loader, slot)}{file}"
