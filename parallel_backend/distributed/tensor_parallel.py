"""Layers that hold only this rank's slice of their weights, and say which slice that is.

Source: Megatron-LM (Shoeybi et al. 2019, section 3): a column-parallel layer followed by a row-parallel one
needs one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .collectives import Handle, start_all_reduce
from .mesh import MeshAxis


@dataclass(frozen=True)
class Shard:
    """Which part of a full tensor a rank keeps: `ranges` (start, stop) of `dim`, joined in this order."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def cut(whole: Tensor, shard: Shard | None) -> Tensor:
    """That part of a full tensor: a view of it where it is one range."""
    if shard is None:
        return whole
    parts = [whole.narrow(shard.dim, start, stop - start) for start, stop in shard.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, shard.dim)


class ShardedParameter(nn.Parameter):
    """A parameter that knows the shape of the full tensor and its own part of it.

    `shard` None keeps all. One that is `fp32` stays so in a model of half precision.
    """

    full_shape: tuple[int, ...]
    shard: Shard | None
    fp32: bool


def sharded_parameter(full_shape: Sequence[int], shard: Shard | None = None, *, fp32: bool = False) -> ShardedParameter:
    """An empty parameter of the local shape, on the default device."""
    shape = list(full_shape)
    if shard is not None:
        shape[shard.dim] = shard.size
    parameter = ShardedParameter(torch.empty(shape), requires_grad=False)
    parameter.full_shape, parameter.shard, parameter.fp32 = tuple(full_shape), shard, fp32
    return parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b for this rank's output features only.

    Args:
        ranges: the output features kept, as (start, stop); None keeps all.
    Returns: (..., kept features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranges: Sequence[tuple[int, int]] | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        shard = None if ranges is None else Shard(0, tuple(ranges))
        self.weight = sharded_parameter((out_features, in_features), shard)
        self.bias = sharded_parameter((out_features,), shard) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b, of which this rank has the input features `range`; summed over the axis.

    `start` leaves the sum under way, so that the caller can compute something else meanwhile.
    Comm: one all-reduce of the output.
    """

    def __init__(
        self, in_features: int, out_features: int, kept: tuple[int, int], axis: MeshAxis, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = sharded_parameter((out_features, in_features), Shard(1, (kept,)))
        self.bias = sharded_parameter((out_features,)) if bias else None
        self.axis = axis

    def start(self, x: Tensor) -> Handle:
        # The bias is added by one rank only, before the sum: one pass over the output less.
        return start_all_reduce(F.linear(x, self.weight, self.bias if self.axis.rank == 0 else None), self.axis)

    def forward(self, x: Tensor) -> Tensor:
        return self.start(x).wait()
