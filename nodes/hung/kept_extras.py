"""What patches have become, kept as long as they are there: their tensors are then the same ones at every evaluation, and sent once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import ref

from ...parallel_backend.rpc.extras import AnyExtra
from .patches import Call, Patch

X = TypeVar("X", bound=AnyExtra)
# For areas of a picture, which take turns.
_MOST_KEPT = 8


@dataclass(frozen=True)
class _Kept:
    """Of these patches, where they were called as `of` says."""

    of: tuple[Any, ...]
    functions: tuple[ref[Any], ...]
    extras: Sequence[Any]


def kept_extras(
    patches: Sequence[Patch], call: Call, of: tuple[Any, ...], make: Callable[[], Sequence[X]]
) -> Sequence[X]:
    """What `make` gives, called where these patches have not been made extras yet.

    Args:
        of: what else the extras depend on.
    """
    functions, network = [patch.function for patch in patches], _remote(call)
    kept: list[_Kept] = network.translated.setdefault(functions[0], [])
    for one in kept:
        if one.of == of and [function() for function in one.functions] == functions:
            return one.extras
    made = _Kept(of, tuple(map(ref, functions)), make())
    kept[:] = [*kept[1 - _MOST_KEPT :], made]
    return made.extras


def _remote(call: Call) -> Any:
    """The network as what it is: see `nodes/remote_network.py`."""
    return call.network
