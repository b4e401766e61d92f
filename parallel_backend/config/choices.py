"""Checks that all settings share."""

from __future__ import annotations

from math import isfinite

from ..errors import ConfigError


def choose(value: str, allowed: tuple[str, ...], what: str) -> str:
    """`value`, which is one of `allowed`, or a ConfigError that lists them."""
    if value not in allowed:
        raise ConfigError(f"{what} {value!r} is not known.", f"Choose one of: {', '.join(allowed)}.")
    return value


def check_positive(name: str, value: float, usual: str) -> None:
    """Raises ConfigError unless it is a finite number above 0."""
    if not (isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value} is not possible.", f"Use a positive number; {usual}.")
