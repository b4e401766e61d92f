"""Half-precision files held in fp8: a rank quantises its part of each weight as it reads it, on its device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..config import FP8
from ..distributed.tensor_parallel import Shard, cut
from ..quantized.forms import ScaledFP8
from ..quantized.weight import Part, QuantizedWeight
from .checkpoint import SourceOver

_E4M3 = torch.float8_e4m3fn


@dataclass
class FP8Source(SourceOver):
    """The tensors of `inner`, which become fp8.

    Args:
        inner: of half precision, or, where `weights` is a type's name, of fp8 without scales.
        weights: of config.WEIGHTS. fp8: matrices and kernels, each row divided by a scale of its own. Rows are scaled whole,
            also where ranks hold columns of them, so that the values are the same on any mesh; such a tensor is read whole.
            A type's name: every tensor, cast to it.
        edges: how the names of the layers begin by which the model takes in and gives out: `fp8` leaves them as they are.
        device: where it is computed, and where what is read lies.
    """

    weights: str
    edges: tuple[str, ...]
    device: torch.device

    def names(self) -> list[str]:
        return self.inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.inner.shape(name)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        if not self._becomes_fp8(name):
            return self.inner.held_bytes(name, shard)
        shape = list(self.shape(name))
        if shard is not None:
            shape[shard.dim] = shard.size
        return prod(shape) + (4 * shape[0] if self.weights == FP8 else 0)

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        if not self._becomes_fp8(name):
            return self.inner.read(name, shard)
        if self.weights != FP8:
            return _fp8_weight(self._there(name, shard).to(getattr(torch, self.weights)))
        if shard is None or shard.dim == 0:
            return scaled_by_row(self._there(name, shard), None)
        return scaled_by_row(self._there(name, None), shard)

    def _there(self, name: str, shard: Shard | None) -> Tensor:
        tensor = self.inner.read(name, shard)
        if isinstance(tensor, QuantizedWeight):  # of a type that is cast to another
            tensor = tensor.dequantized()
        return tensor.to(self.device)

    def _becomes_fp8(self, name: str) -> bool:
        dims = len(self.shape(name))
        if self.weights == FP8:
            return dims in (2, 4) and not name.startswith(self.edges)
        return dims > 0


def scaled_by_row(tensor: Tensor, shard: Shard | None) -> QuantizedWeight:
    """Of whole rows, those columns of the shard."""
    values = tensor.float().flatten(1)
    scale = values.abs().amax(1, keepdim=True) / torch.finfo(_E4M3).max
    scale.masked_fill_(scale == 0, 1.0)
    data = (values / scale).to(_E4M3).view(tensor.shape)
    return _fp8_weight(cut(data, shard).contiguous(), scale.flatten())


def _fp8_weight(*tensors: Tensor) -> QuantizedWeight:
    shape = tensors[0].shape
    return QuantizedWeight([Part(ScaledFP8(), tensors, (0, shape[0]))], shape, torch.float32)
