"""GGUF files as sources of tensors: a rank reads its rows and its blocks of columns, still quantised."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint_files.gguf_file import PLAIN, GGUFTensor, gguf_package, gguf_tensors
from ..checkpoint_files.safetensors_file import check_stamp, stamp
from ..distributed.tensor_parallel import Shard, cut
from ..quantized.forms import GGUF, is_known
from ..quantized.gguf_values import dequantized, plain_values, stored
from ..quantized.weight import Part, QuantizedWeight
from .packed_source import Range, quantized_weight, whole_units


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
            units = (whole_units(span, _block(tensor.kind)[0], tensor.shape[1]) for span in shard.ranges)
            kept = sum(stop - start for start, stop in units)
        return round(tensor.data.nbytes * kept / tensor.shape[shard.dim])

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        tensor = self._tensors[name]
        if tensor.kind in PLAIN:
            out = cut(plain_values(tensor), shard)
        elif is_known(tensor.kind) and (shard is None or shard.dim == 0 or len(tensor.shape) == 2):
            out = quantized_weight(tensor.shape, shard, partial(_part, tensor))
        else:  # a type that no function for devices knows, or a table of positions
            out = cut(dequantized(tensor), shard)
        self.bytes_read += out.held_bytes if isinstance(out, QuantizedWeight) else out.nbytes
        return out


def _part(tensor: GGUFTensor, rows: Range, columns: Range) -> Part:
    """Whole blocks, of which those rows and columns are meant."""
    data, all_columns = stored(tensor), prod(tensor.shape[1:])
    block, size = _block(tensor.kind)
    if len(tensor.shape) != 2 or data.shape[0] != tensor.shape[0]:
        return _folded(tensor, data.reshape(-1, size), rows, None if columns == (0, all_columns) else columns)
    left, right = whole_units(columns, block, all_columns)
    kept = data[slice(*rows), left // block * size : right // block * size].clone(memory_format=torch.contiguous_format)
    meant = None if columns == (left, right) else (columns[0] - left, columns[1] - left)
    return Part(GGUF(tensor.kind), (kept,), (0, rows[1] - rows[0]), meant)


def _folded(tensor: GGUFTensor, blocks: Tensor, rows: Range, columns: Range | None) -> Part:
    """Rows that begin and end anywhere in the file's blocks; of columns nothing can be left out."""
    (first, last), row = rows, prod(tensor.shape[1:])
    block = _block(tensor.kind)[0]
    start, stop = whole_units((first * row, last * row), block, len(blocks) * block)
    form = GGUF(tensor.kind, (first * row - start, (last - first, *tensor.shape[1:])))
    return Part(form, (blocks[start // block : stop // block].clone(),), (0, last - first), columns)


def _block(kind: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    gguf = gguf_package()
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return values, size
