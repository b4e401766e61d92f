"""CFG parallel: one rank of the axis computes cond, the other uncond.

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
    """The branches that this rank computes. With a single branch both ranks compute it, and nothing is sent."""
    if axis.degree == 1 or len(branches) == 1:
        return list(branches)
    return [branches[axis.rank]]


def gather_branches(outputs: Sequence[Tensor], full_count: int, axis: MeshAxis) -> list[Tensor]:
    """The outputs of all branches, in order, on every rank.

    Comm: with two ranks and two branches, one all-gather of an output.
    """
    if len(outputs) == full_count:
        return list(outputs)
    return list(all_gather(outputs[0].unsqueeze(0), 0, [1] * full_count, axis).unbind(0))
