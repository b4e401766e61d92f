"""What tests share: begun by the first test that asks for it, ended right after the last one that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest
from beside import looks_beside

T = TypeVar("T")
# Fixtures that hold processes, and so memory.
SHARED = ("backend4", "backend2", "comfy_backend", "default_backend", "server")


class Sharing:
    """Knows which tests are still to come, and how to end what no longer has any."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}
        self._ends: dict[str, Callable[[], None]] = {}
        self._empties: dict[str, Callable[[], None]] = {}

    def plan(self, items: Sequence[pytest.Item]) -> None:
        """Notes the last of these tests that uses each shared fixture."""
        for item in items:
            self._last.update(dict.fromkeys(used_by(item), item.nodeid))

    def until_last_use(
        self, name: str, value: T, end: Callable[[T], None], empty: Callable[[T], None] = lambda value: None
    ) -> Iterator[T]:
        """The body of a session's fixture `name`, which gives `value`. `empty` lets go of what a module has left in it."""
        self._ends[name], self._empties[name] = lambda: end(value), lambda: empty(value)
        yield value
        self._end(name)  # where the session ends early

    def after(self, item: pytest.Item) -> None:
        for name, last in self._last.items():
            if last == item.nodeid:
                self._end(name)

    def after_module(self) -> None:
        for name in self._ends:
            self._empties[name]()

    def _end(self, name: str) -> None:
        if (end := self._ends.pop(name, None)) is not None:
            end()


def used_by(item: pytest.Item) -> set[str]:
    return set(SHARED) & set(getattr(item, "fixturenames", ()))


def in_order(items: Sequence[pytest.Item], apart: Sequence[pytest.Item] = ()) -> list[pytest.Item]:
    """Modules whole and by name, but so that few shared things live side by side, and both cores have work at any time.

    Those first that go well with what goes on beside, without a backend, then on backend2; those that look at what went on
    beside; those that need both cores, without a backend, on backend2; those on backend4; a ComfyUI with backend2, one alone;
    those that have run apart meanwhile.
    """
    elsewhere, needs = {item.path for item in apart}, dict[str, set[str]]()
    for item in items:
        needs.setdefault(item.path.name, set()).update(used_by(item), {"beside"} if looks_beside(item) else ())
        if item.get_closest_marker("busy"):
            needs[item.path.name].add("busy")

    def place(item: pytest.Item) -> tuple[int, ...]:
        needed = needs[item.path.name]
        if item.path in elsewhere:
            return (5,)
        if "server" in needed:
            return 4, "backend2" not in needed
        when = 3 if "backend4" in needed else 2 if "busy" in needed else 1 if "beside" in needed else 0
        return when, "backend2" in needed

    return sorted(items, key=place)
