"""Data parallel: the rows of a batch are spread over an axis, and results come back to every rank."""

from __future__ import annotations

from torch import Tensor

from .collectives import all_gather, split_range, split_sizes
from .mesh import MeshAxis


def shard_batch(x: Tensor, axis: MeshAxis) -> Tensor:
    """This rank's rows of `x`; none where there are fewer rows than ranks."""
    return x[slice(*split_range(x.shape[0], axis.degree, axis.rank))]


def gather_batch(x: Tensor, full_rows: int, axis: MeshAxis) -> Tensor:
    """All `full_rows` rows, in order, on every rank.

    Comm: one all-gather of x, padded to the longest share.
    """
    return all_gather(x, 0, split_sizes(full_rows, axis.degree), axis)
