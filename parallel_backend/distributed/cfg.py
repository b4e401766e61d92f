"""CFG parallel: one rank of the axis computes cond, the other uncond. What guidance asks for beyond these, both compute.

Source: xDiT's CFG parallel; guidance is Ho and Salimans 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from .collectives import all_gather
from .mesh import MeshAxis

T = TypeVar("T")


def own_branches(branches: Sequence[T], axis: MeshAxis) -> list[T]:
    """The branches that this rank computes: one of the first two, and all others.

    A third is not spread: one rank would wait for the other's two, so both compute two, and less is sent. With a single branch
    both ranks compute it, and nothing is sent.
    """
    if axis.degree == 1 or len(branches) == 1:
        return list(branches)
    return [branches[axis.rank], *branches[2:]]


def gather_branches(outputs: Sequence[Tensor], full_count: int, axis: MeshAxis) -> list[Tensor]:
    """The outputs of all branches, in order, on every rank.

    Comm: with two ranks and two branches or more, one all-gather of an output.
    """
    if len(outputs) == full_count:
        return list(outputs)
    spread, *others = outputs
    return [*all_gather(spread.unsqueeze(0), 0, [1] * axis.degree, axis).unbind(0), *others]
