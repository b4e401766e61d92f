"""A pack's function asked what it does, before the ranks are told its numbers: a copy of it is called with known numbers.

Nothing of the pack is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from .pack_version import pack_and_version
from .refusal import LOCALLY, MISFITS

_TOLERANCE = 1e-4


def with_others(
    function: Any, names: Mapping[str, Any] | None = None, held: Mapping[str, Any] | None = None
) -> FunctionType:
    """A copy that finds these values under names of its module, and in variables of the function that it was made in."""
    code, own, others = function.__code__, function.__closure__ or (), held or {}
    cells = (
        CellType(others[name]) if name in others else cell for name, cell in zip(code.co_freevars, own, strict=True)
    )
    known = {**function.__globals__, **(names or {})}
    made = FunctionType(code, known, function.__name__, function.__defaults__, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def check(name: str, function: Any, ask: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Raises: UnsupportedError: what `ask` has the function give isn't what it says that it should, or can't be had."""
    try:
        theirs, ours = ask()
    except MISFITS as error:
        raise unknown(name, function, error) from error
    if not is_alike(theirs, ours):
        raise unknown(name, function, "it computes something else")


def drawn(*shape: int) -> Tensor:
    """The same random numbers each time, another set for each shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def is_alike(theirs: Tensor, ours: Tensor) -> bool:
    """Whether both are of one shape and one value."""
    return theirs.shape == ours.shape and torch.allclose(theirs.cpu(), ours, rtol=_TOLERANCE, atol=_TOLERANCE)


def unknown(name: str, of_pack: Any, why: str | Exception) -> UnsupportedError:
    """What to raise for a function or class of a pack that does something else than what goes by this name."""
    if isinstance(why, Exception):
        why = f"{type(why).__name__}: {str(why)[:200]}"
    return UnsupportedError(
        f"{name} ({pack_and_version(of_pack)}) is of a version that is not known: {why}.",
        f"Use another version of that pack, or {LOCALLY}.",
    )
