"""What others ask of the packages that this pack runs on, and those of each other, where the installed versions don't meet it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from .requirements import COMMANDS_NEED, FILES_NEED, RANKS_NEED, admits, agree, applies, asked, pip_install

_SELF = "parallel-mmdit"


@dataclass(frozen=True)
class Clash:
    """`by` asks for `wanted`, of which the version `found` is here, if any.

    Args:
        is_ours: `by` is a package that this pack runs on, which may fail; else it is another pack or package, which may.
        ours: what this pack, and what it runs on, ask of the same.
    """

    by: str
    wanted: Requirement
    found: str | None
    is_ours: bool
    ours: Sequence[Requirement]

    @property
    def what(self) -> str:
        return f"{self.by} asks for {self.wanted.name}{self.wanted.specifier}, found {self.found or 'none'}"

    @property
    def remedy(self) -> str:
        if all(agree(self.wanted, other) for other in self.ours):
            specifiers = dict.fromkeys(str(one.specifier) for one in (*self.ours, self.wanted) if one.specifier)
            return pip_install(f"{self.wanted.name}{','.join(specifiers)}")
        asks = ", ".join(dict.fromkeys(str(other.specifier) for other in self.ours if not agree(self.wanted, other)))
        return (
            f"No version suits both ({asks} is needed here): see whether it works all the same, else use two ComfyUIs."
        )


def clashes() -> Iterator[Clash]:
    """All but this pack's own requirements, which `shortfall` is about."""
    needed = _needed()
    for by, line in asked():
        owner = canonicalize_name(by.split()[0])
        wanted = _applying(line)
        if wanted is None or owner == _SELF or (name := canonicalize_name(wanted.name)) not in needed:
            continue
        found = _version(name)
        with suppress(InvalidVersion, TypeError):
            if (owner in needed) if found is None else not admits(wanted, found):
                yield Clash(by, wanted, found, owner in needed, needed[name])


def _needed() -> Mapping[str, Sequence[Requirement]]:
    """By name, the packages that this pack runs on, and what it and they ask of each."""
    needed: dict[str, list[Requirement]] = {}
    left = [*RANKS_NEED, *COMMANDS_NEED, *FILES_NEED]
    while left:
        requirement = _applying(left.pop())
        if requirement is None:
            continue
        name = canonicalize_name(requirement.name)
        if name not in needed:
            with suppress(importlib.metadata.PackageNotFoundError):
                left += importlib.metadata.requires(name) or ()
        needed.setdefault(name, []).append(requirement)
    return needed


def _applying(line: str) -> Requirement | None:
    """The requirement that a line states; None where it states none, or none for here."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    return requirement if applies(requirement) else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
