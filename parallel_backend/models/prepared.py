"""What a network computes of a prompt alone, and keeps: no step changes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import ref

from torch import Tensor


@dataclass(frozen=True)
class PreparedPrompt:
    """Text tokens (B, L, E) and pooled prompt (B, A) as they were given, and what one network has made of them.

    Args:
        tensors: as this rank's part of the network needs them, by names of its own. They hold as long as its weights stay.
    """

    context: Tensor
    pooled: Tensor
    tensors: Mapping[str, Tensor]

    def nbytes(self) -> int:
        """Of what was made."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class _Made:
    network: ref[object]
    context: ref[Tensor]
    pooled: ref[Tensor]
    prepared: PreparedPrompt

    def is_used(self) -> bool:
        return None not in (self.network(), self.context(), self.pooled())


class PreparedPrompts:
    """What networks made of the prompts that came last: a sampling step by step asks with the same at every evaluation.

    Args:
        most: prompts that are kept, by identity; only as long as somebody else has them.
    """

    def __init__(self, most: int) -> None:
        self._most, self._version = most, 0
        self._made: OrderedDict[tuple[int, int, int], _Made] = OrderedDict()

    def of(
        self, network: object, context: Tensor, pooled: Tensor, make: Callable[[], PreparedPrompt]
    ) -> PreparedPrompt:
        """What that network made of these two tensors; `make` is called where it hasn't yet."""
        self._made = OrderedDict((key, made) for key, made in self._made.items() if made.is_used())
        key = (id(network), id(context), id(pooled))
        # Nothing that is in use has another's number.
        made = self._made.pop(key, None) or _Made(ref(network), ref(context), ref(pooled), make())
        self._made[key] = made
        while len(self._made) > self._most:
            self._made.popitem(last=False)
        return made.prepared

    def at_version(self, version: int) -> None:
        """Of these weights and no others: those of other ones are forgotten."""
        if version != self._version:
            self._made.clear()
        self._version = version
