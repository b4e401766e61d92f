"""Safetensors files of quantised weights: a rank reads its rows and columns of them, still quantised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..checkpoint_files.bitsandbytes_entries import FOUR_BITS
from ..checkpoint_files.packed_entries import TILE, PackedEntry, without_packing
from ..checkpoint_files.safetensors_file import tensor_bytes
from ..distributed.tensor_parallel import Shard, cut
from ..quantized import bitsandbytes
from ..quantized.forms import form_of, scale_columns
from ..quantized.weight import Part, QuantizedWeight
from .checkpoint import SafetensorsSource

# First, and one past last.
Range: TypeAlias = tuple[int, int]


class PackedSource(SafetensorsSource):
    """As if nothing were quantised; what is read of a quantised tensor is a `QuantizedWeight`.

    Raises: UnsupportedError, CheckpointError: as `without_packing`; UnsupportedError: the package of a form is not there.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        super().__init__(path, prefix)
        self._raw = self._entries
        self._entries, self._packed = without_packing(self._raw, self._metadata, prefix, self._text, path.name)
        # A package that is missing is told now, before others make room for the model.
        for form, options in {entry.form: entry.options for entry in self._packed.values()}.items():
            bitsandbytes.package() if form in FOUR_BITS else form_of(form, options)

    def _text(self, name: str) -> bytes:
        return tensor_bytes(self._file_of[name], self._raw[name])

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        entry = self._packed.get(name)
        if entry is None:
            return None
        if entry.form in FOUR_BITS:
            kept: list[tuple[Range, ...]] = [((0, side),) for side in entry.shape]
            if shard is not None:
                kept[shard.dim] = shard.ranges
            return bitsandbytes.held_bytes(entry, kept[0], kept[1][0])
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
        return quantized_weight(entry.shape, shard, lambda rows, columns: self._part(entry, rows, columns))

    def _values(self, name: str, entry: PackedEntry, shard: Shard) -> Tensor:
        """fp32, of a tensor that is no matrix and isn't cut by rows: a table of positions."""
        if len(entry.parts) == 1:
            return self._stored(name, shard).float()
        return cut(self.read(name), shard)

    def _part(self, entry: PackedEntry, rows: Range, columns: Range) -> Part:
        """Whole units of the file, of which those rows and columns are meant."""
        if entry.form in FOUR_BITS:
            return bitsandbytes.bitsandbytes_part(entry, rows, columns, self._range)
        top, bottom = whole_units(rows, entry.unit[0], entry.shape[0])
        left, right = whole_units(columns, entry.unit[1], prod(entry.shape[1:]))
        data = self._data(entry, (top, bottom), (left, right))
        scales = [self._scale(entry, name, (top, bottom), (left, right)) for name in entry.parts[1:]]
        meant = None if columns == (left, right) else (columns[0] - left, columns[1] - left)
        return Part(form_of(entry.form, entry.options), (data, *scales), (rows[0] - top, rows[1] - top), meant)

    def _range(self, name: str, start: int, stop: int) -> Tensor:
        return self._stored(name, Shard(0, ((start, stop),)))

    def _data(self, entry: PackedEntry, rows: Range, columns: Range) -> Tensor:
        """Those rows, and of them those columns of values, of which an element can hold several."""
        name, all_columns = entry.parts[0], prod(entry.shape[1:])
        if columns == (0, all_columns):
            return self._stored(name, Shard(0, (rows,)))
        packed = all_columns // self._raw[name]["shape"][1]
        left, right = (column // packed for column in columns)
        if rows == (0, self._raw[name]["shape"][0]):
            return self._stored(name, Shard(1, ((left, right),)))
        return self._stored(name, Shard(0, (rows,)))[:, left:right].contiguous()

    def _scale(self, entry: PackedEntry, name: str, rows: Range, columns: Range) -> Tensor:
        if prod(self._raw[name]["shape"]) == 1:
            return self._stored(name)
        if name == entry.parts[1] and entry.is_tiled:
            tiles = whole_units(rows, TILE[0], self._raw[name]["shape"][0])
            return scale_columns(entry.form, self._stored(name, Shard(0, (tiles,))), *columns)
        return self._stored(name, Shard(0, (rows,)))


def quantized_weight(
    shape: Sequence[int], shard: Shard | None, part: Callable[[Range, Range], Part]
) -> QuantizedWeight:
    """What `part` gives of the shard's rows and columns of a tensor of that shape, one below the other."""
    rows: tuple[Range, ...] = ((0, shape[0]),)
    columns, local = (0, prod(shape[1:])), list(shape)
    if shard is not None:
        local[shard.dim] = shard.size
        if shard.dim == 0:
            rows = shard.ranges
        else:
            (columns,) = shard.ranges
    return QuantizedWeight([part(span, columns) for span in rows], local, torch.float32)


def whole_units(wanted: Range, unit: int, end: int) -> Range:
    """The range with all units whole that it touches."""
    return wanted[0] // unit * unit, min(-(-wanted[1] // unit) * unit, end)
