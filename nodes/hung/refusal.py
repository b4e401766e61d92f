"""How what can't be honoured is refused: everything at once, each by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from ...parallel_backend.errors import UnsupportedError

# A way out that no node of ours refuses in turn.
LOCALLY = "have ComfyUI compute this MODEL: with its own loader (the setting that makes every model parallel off) and KSampler"
ELSEWHERE = f"The weights live in the backend. Remove that node, or {LOCALLY}."
IN_MESH_CONFIG = "Remove that node; Mesh Config has the ranks' dtype, and compiles on the ranks."
RELOAD = f"The weights live in the backend. Remove that node and free the models and node cache, or {LOCALLY}."

# What a pack's own code raises where what it is given doesn't fit it.
MISFITS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)

# In a sentence; a MODEL with more on it has the rest of them in the details.
_TOLD = 6


def module_of(made: Any) -> str:
    """The module of a class or function, a pack's by its folder: ComfyUI loads those under their whole path."""
    return PurePath(made.__module__ or "").name


def as_sentence(half: str) -> str:
    """A remedy by itself that is elsewhere the second one of two."""
    return half[:1].upper() + half[1:]


def is_set(value: Any) -> bool:
    """Whether an option says anything; a tensor does, whatever its values."""
    return value is not None and (hasattr(value, "shape") or bool(value))


def refuse(found: Iterator[str], where: str, remedy: str) -> None:
    """Raises UnsupportedError that names everything in `found`; nothing where it is empty."""
    names = list(found)
    if names:
        told = "; ".join(names[:_TOLD]) + (f"; and {len(names) - _TOLD} more" if len(names) > _TOLD else "")
        raise UnsupportedError(f"{where} can't honour {told}.", remedy, "\n".join(names[_TOLD:]))
