"""How far something is: a bar on a terminal; a first and a last line in a file, which keeps every tick that is written to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


@contextmanager
def progress(
    title: str, total: int | None = None, initial: int = 0, *, leave: bool = True, shown: bool = True
) -> Iterator[tqdm]:
    """A bar to update; one without a total shows the time alone. `leave`: it stays on the terminal. Not `shown`: nothing.

    On stderr, as tqdm's bars are; where that is no terminal, the title with dots, then with the seconds it took.
    """
    terminal, begun = sys.stderr.isatty(), time.monotonic()
    shape = None if total is not None else "{desc} {elapsed}"
    off = not (shown and terminal)
    if shown and not terminal:
        _say(f"{title} ...")
    with tqdm(total=total, initial=initial, desc=title, leave=leave, bar_format=shape, disable=off) as bar:
        yield bar
    if shown and not terminal:
        _say(f"{title}: {time.monotonic() - begun:.1f} s")


def _say(line: str) -> None:
    sys.stdout.flush()  # what was said there before stands before it, where both go to one file
    print(line, file=sys.stderr, flush=True)


def each(items: Sequence[T], title: str, *, leave: bool = True) -> Iterable[T]:
    """The items, one tick after each."""
    with progress(title, len(items), leave=leave) as bar:
        for item in items:
            yield item
            bar.update()
