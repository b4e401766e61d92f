"""GGUF files as sources of tensors: a rank reads its rows and its blocks of columns, still quantised."""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint_files.gguf_file import PLAIN, GGUFTensor, gguf_package, gguf_tensors
from ..checkpoint_files.safetensors_file import check_stamp, stamp
from ..distributed.tensor_parallel import Shard
from ..quantized.forms import GGUF, is_known
from ..quantized.weight import Part, QuantizedWeight


class GGUFSource:
    """The tensors of a GGUF file below a name prefix. Raises: CheckpointError, UnsupportedError: as `gguf_tensors`."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.bytes_read = path, 0
        self._stamp = stamp(path)
        found = gguf_tensors(path)
        self._tensors = {name[len(prefix) :]: tensor for name, tensor in found.items() if name.startswith(prefix)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def check_unchanged(self) -> None:
        check_stamp(self.path, self._stamp)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        tensor = self._tensors[name]
        if tensor.kind in PLAIN or not is_known(tensor.kind):
            return None
        if shard is None:
            return int(tensor.data.nbytes)
        kept = shard.size
        if shard.dim == 1:  # whole blocks
            block = gguf_package().GGML_QUANT_SIZES[gguf_package().GGMLQuantizationType[tensor.kind]][0]
            kept = sum(-(-stop // block) * block - start // block * block for start, stop in shard.ranges)
        return round(tensor.data.nbytes * min(1.0, kept / tensor.shape[shard.dim]))

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        tensor = self._tensors[name]
        if tensor.kind in PLAIN:
            out = _cut(_values(tensor), shard)
        elif is_known(tensor.kind) and (shard is None or shard.dim == 0 or len(tensor.shape) == 2):
            out = _quantized(tensor, shard)
        else:
            out = _cut(_dequantized(tensor), shard)
        self.bytes_read += out.held_bytes if isinstance(out, QuantizedWeight) else out.nbytes
        return out


def _values(tensor: GGUFTensor) -> Tensor:
    """Mapped, of a tensor that is not quantised."""
    data = _torch(tensor)
    return (data.view(torch.bfloat16) if tensor.kind == "BF16" else data).view(tensor.shape)


def _dequantized(tensor: GGUFTensor) -> Tensor:
    """fp32, by the gguf package on the CPU: for types that no function for devices knows, and for tables of positions."""
    gguf = gguf_package()
    values = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.kind])
    return torch.from_numpy(values).view(tensor.shape)


def _cut(whole: Tensor, shard: Shard | None) -> Tensor:
    if shard is None:
        return whole.clone()
    return torch.cat([whole.narrow(shard.dim, a, b - a) for a, b in shard.ranges], shard.dim)


def _quantized(tensor: GGUFTensor, shard: Shard | None) -> QuantizedWeight:
    """Whole blocks, of which the shard's rows or columns are meant."""
    data = _torch(tensor)
    gguf = gguf_package()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind]]
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    shape = list(tensor.shape)
    ranges: tuple[tuple[int, int], ...] = ((0, rows),)
    if shard is not None:
        shape[shard.dim] = shard.size
        ranges = shard.ranges if shard.dim == 0 else ranges
    folded = len(tensor.shape) != 2 or data.shape[0] != rows
    if shard is not None and shard.dim == 1:
        ((left, right),) = shard.ranges
        if folded:  # nothing of it can be left out
            whole = replace(_run(tensor, data.reshape(-1, size), 0, rows, block), columns=(left, right))
            return QuantizedWeight([whole], shape, torch.float32)
        c, d = left // block * block, min(-(-right // block) * block, columns)
        kept = data[:, c // block * size : d // block * size].contiguous()
        part = Part(GGUF(tensor.kind), (kept,), (0, rows), (left - c, right - c))
        return QuantizedWeight([part], shape, torch.float32)
    parts = []
    for a, b in ranges:
        if folded:
            parts.append(_run(tensor, data.reshape(-1, size), a, b, block))
        else:
            parts.append(Part(GGUF(tensor.kind), (data[a:b].clone(),), (0, b - a)))
    return QuantizedWeight(parts, shape, torch.float32)


def _run(tensor: GGUFTensor, blocks: Tensor, a: int, b: int, block: int) -> Part:
    """Rows that begin and end anywhere in the file's blocks."""
    row = prod(tensor.shape[1:])
    first, last = a * row // block, -(-b * row // block)
    form = GGUF(tensor.kind, (a * row - first * block, (b - a, *tensor.shape[1:])))
    return Part(form, (blocks[first:last].clone(),), (0, b - a))


def _torch(tensor: GGUFTensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(tensor.data)
