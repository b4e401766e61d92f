"""Safetensors files of quantised weights: a rank reads its rows and columns of them, still quantised."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint_files.packed_entries import PackedEntry, packed_entries
from ..distributed.tensor_parallel import Shard
from ..quantized.forms import form_of, scale_columns
from ..quantized.weight import Part, QuantizedWeight
from .checkpoint import SafetensorsSource


class PackedSource(SafetensorsSource):
    """As if nothing were quantised; what is read of a quantised tensor is a `QuantizedWeight`.

    Raises: UnsupportedError, CheckpointError: as `packed_entries`.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        super().__init__(path, prefix)
        self._raw = self._entries
        self._entries, self._packed = packed_entries(path, prefix)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        entry = self._packed.get(name)
        if entry is None:
            return None
        shape = list(entry.shape)
        if shard is not None:
            shape[shard.dim] = shard.size
        whole = sum(self._bytes_of(part) for part in entry.parts)
        return round(whole * prod(shape) / prod(entry.shape))

    def _bytes_of(self, name: str) -> int:
        start, stop = self._raw[name]["data_offsets"]
        return stop - start

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        entry = self._packed.get(name)
        if entry is None:
            return super().read(name, shard)
        if shard is not None and shard.dim == 1 and len(entry.shape) != 2:
            return self._values(name, entry, shard)
        rows, columns = [(0, entry.shape[0])], (0, prod(entry.shape[1:]))
        if shard is not None and shard.dim == 0:
            rows = list(shard.ranges)
        elif shard is not None:
            ((start, stop),) = shard.ranges
            columns = (start, stop)
        parts = [self._part(entry, a, b, *columns) for a, b in rows]
        shape = [sum(b - a for a, b in rows), *entry.shape[1:]]
        if shard is not None and shard.dim == 1:
            shape[1] = shard.size
        return QuantizedWeight(parts, shape, torch.float32)

    def _values(self, name: str, entry: PackedEntry, shard: Shard) -> Tensor:
        """fp32, of a tensor that is no matrix and isn't cut by rows: a table of positions."""
        if len(entry.parts) == 1:
            return self._stored(name, shard).float()
        whole = self.read(name)
        return torch.cat([whole.narrow(shard.dim, a, b - a) for a, b in shard.ranges], shard.dim)

    def _part(self, entry: PackedEntry, top: int, bottom: int, left: int, right: int) -> Part:
        """Whole units of the file, of which those rows and columns are meant."""
        (row_unit, column_unit), full = entry.unit, (entry.shape[0], prod(entry.shape[1:]))
        a, b = _whole(top, bottom, row_unit, full[0])
        c, d = _whole(left, right, column_unit, full[1])
        data, scales = entry.parts[0], entry.parts[1:]
        tensors = [self._cut(data, a, b, c, d, full[1])]
        for scale in scales:
            tensors.append(self._scale(entry, scale, a, b, c, d))
        columns = None if (left, right) == (c, d) else (left - c, right - c)
        return Part(form_of(entry.form, entry.options), tuple(tensors), (top - a, bottom - a), columns)

    def _cut(self, name: str, a: int, b: int, c: int, d: int, columns: int) -> Tensor:
        """Rows a to b and values c to d of them; an element can hold several values."""
        if (c, d) == (0, columns):
            return self._stored(name, Shard(0, ((a, b),)))
        packed = columns // self._raw[name]["shape"][1]
        whole_rows = self._raw[name]["shape"][0] == b - a
        if whole_rows:
            return self._stored(name, Shard(1, ((c // packed, d // packed),)))
        return self._stored(name, Shard(0, ((a, b),)))[:, c // packed : d // packed].contiguous()

    def _scale(self, entry: PackedEntry, name: str, a: int, b: int, c: int, d: int) -> Tensor:
        shape = self._raw[name]["shape"]
        if prod(shape) == 1:
            return self._stored(name)
        if name == entry.parts[1] and entry.form in ("nvfp4", "mxfp8"):
            return scale_columns(entry.form, self._stored(name, Shard(0, ((a, -(-b // 128) * 128),))), c, d)
        return self._stored(name, Shard(0, ((a, b),)))


def _whole(start: int, stop: int, unit: int, end: int) -> tuple[int, int]:
    """The range with the units whole that it touches."""
    return start // unit * unit, min(-(-stop // unit) * unit, end)
