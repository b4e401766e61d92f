"""Tensors of a file that its model doesn't have: ComfyUI logs them and draws, and so do ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHOWN = 5


def left_over_note(wanted: Iterable[str], found: Iterable[str], file_name: str) -> str:
    """A line for the load's report; empty where the model takes all that was found."""
    names = sorted(set(found) - set(wanted))
    if not names:
        return ""
    return (
        f"{file_name}: left out, as ComfyUI does, {len(names)} tensors that the model doesn't have: {first_of(names)}."
    )


def first_of(names: Sequence[str]) -> str:
    """Some of them, for people to read."""
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
