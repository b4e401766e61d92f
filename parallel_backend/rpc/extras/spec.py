"""What all extras of requests have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")


X = TypeVar("X", bound="ExtraSpec")


# See distributed/sites.py.
PlaceName: TypeAlias = tuple[str, int, int]


class ExtraSpec(Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Of any kind.

    Args:
        start, end: sigmas between which it acts; None from the first, or to the last.
    """

    start: float | None = None
    end: float | None = None

    tensor_fields: ClassVar[tuple[str, ...]] = ()
    # An evaluation with it gives a tensor of its rows back, after the output.
    reports: ClassVar[bool] = False
    # It mixes rows of both prompts, which are evaluated at once.
    pairs: ClassVar[bool] = False

    # Those of them that are other tensors at each evaluation, and are not kept.
    fresh_fields: ClassVar[tuple[str, ...]] = ()

    def is_at(self, sigma: float) -> bool:
        """Whether it acts there."""
        return (self.end or 0.0) <= sigma and (self.start is None or sigma <= self.start)

    def each(self: X, change: Callable[[Any], Any], fresh: Callable[[Any], Any] | None = None) -> X:
        """`change` done to every tensor, in a fixed order; `fresh` to those of `fresh_fields`, where it is given."""
        changes = {name: fresh or change if name in self.fresh_fields else change for name in self.tensor_fields}
        return msgspec.structs.replace(self, **{name: _each(getattr(self, name), f) for name, f in changes.items()})

    def tensors(self) -> list[Any]:
        """Those that it names, each as often as it does."""
        found: list[Any] = []
        self.each(found.append)
        return found


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each(part, change) for part in value]
    return None if value is None else change(value)
