"""A workflow made parallel, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .check import Findings, Remark, check
from .insert import SWAPPED, SWAPPED_FOR, insert, swap
from .reading import Workflow

NOTHING_TO_DO = "Not an SD3 or SDXL workflow: nothing to do."


@dataclass(frozen=True)
class Report:
    """`changed` has a line for each MODEL that was, or would be, made parallel."""

    found: Findings
    changed: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        if not self.found.concerns_us:
            yield NOTHING_TO_DO
        yield from self.changed
        yield from map(str, self.found.parallel)
        yield from map(str, self.found.local)
        yield from (f"Refused: {remark}" for remark in self.found.refused)
        yield from map(str, self.found.unknown)
        yield from self.found.notes
        if self.found.concerns_us:
            yield "Runs." if self.found.runs else "Something in it would be refused."


def make_parallel(workflow: Workflow, *, swapped: bool = False, only_check: bool = False) -> Report:
    """Changes the workflow in its place, unless `only_check`; one that is parallel already stays as it is.

    Args:
        swapped: CheckpointLoaderSimple gives way to LoadParallelCheckpoint, in place of a node behind it.
    """
    found = check(workflow)
    changed = []
    for loader, slot in found.wanted:
        file = f" ({loader.file})" if loader.file else ""
        if swapped and loader.class_type == SWAPPED:
            if not only_check:
                swap(loader)
            what = f"{SWAPPED_FOR} in place of {loader.label}{file}"
        elif only_check:
            what = f"ParallelizeModel behind {loader.label}{file}"
        else:
            what = f"ParallelizeModel, node {insert(workflow, loader, slot)}, behind {loader.label}{file}"
        changed.append(f"{'Would put' if only_check else 'Put'} {what}.")
    return Report(found, tuple(changed))


def as_json(remarks: list[Remark]) -> list[dict[str, str]]:
    return [{"id": r.key, "title": r.title, "class_type": r.class_type, "why": r.why} for r in remarks]
