"""Weights that bitsandbytes has quantised to 4 bits: any rows and columns of them, dequantised by the package's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_files.packed_entries import PackedEntry
from ..errors import UnsupportedError
from .forms import Form, rows_within
from .weight import Part

# (name of a tensor, first of its first dim, one past last) -> that part of it.
Read = Callable[[str, int, int], Tensor]


class BitsAndBytes(Form):
    """NF4 or FP4: its tensors are bytes of two values each, the largest value of each block, and the 16 values of a block of 1.

    Dequantised in the dtype of the weight before it was quantised, as bitsandbytes does.

    Args:
        kind: nf4 or fp4. block: values that share their largest.
        before: values of the first block that are not the weight's. shape: of its values.
    Raises: UnsupportedError: the package is not there.
    """

    def __init__(self, kind: str, block: int, dtype: torch.dtype, before: int, shape: tuple[int, ...]) -> None:
        self._kind, self._block, self._dtype, self._before, self._shape = kind, block, dtype, before, shape
        package()

    def values(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        data, largest, code = tensors
        # On CPUs the package takes a block to end with its row, and no row of odd length without compiling.
        width = self._shape[1] if self._shape[1] % self._block == 0 else 2 * data.numel()
        bnb, shape = package(), torch.Size([2 * data.numel() // width, width])
        given = {"code": code, "blocksize": self._block, "quant_type": self._kind, "dtype": self._dtype}
        state = bnb.QuantState(largest, shape=shape, **given)
        return rows_within(bnb.dequantize_4bit(data.view(-1, 1), state), self._before, self._shape).to(dtype)


def bitsandbytes_part(entry: PackedEntry, rows: tuple[int, int], columns: tuple[int, int], read: Read) -> Part:
    """Those rows and columns (first, one past last). Whole blocks are kept: of columns, where a row is whole blocks, else all."""
    (count, width), block = entry.shape, entry.options["blocksize"]
    data_name, largest_name, code_name = entry.parts[:3]
    first, last = rows[0] * width // block, -(-rows[1] * width // block)
    data = read(data_name, first * block // 2, min(last * block, count * width + 1) // 2).flatten()
    largest = _largest(entry, first, last, read) if len(entry.parts) > 3 else read(largest_name, first, last)
    before, shape = rows[0] * width - first * block, [rows[1] - rows[0], width]
    meant = None if columns == (0, width) else columns
    if meant is not None and width % block == 0:
        left, right = columns[0] // block, -(-columns[1] // block)
        data = _dense(data.view(shape[0], width // 2)[:, left * block // 2 : right * block // 2])
        largest = _dense(largest.view(shape[0], width // block)[:, left:right])
        shape[1] = (right - left) * block
        meant = (columns[0] - left * block, columns[1] - left * block)
        meant = None if meant == (0, shape[1]) else meant
    form = BitsAndBytes(entry.form, block, getattr(torch, entry.options["dtype"]), before, tuple(shape))
    return Part(form, (data, largest, read(code_name, 0, 16)), (0, shape[0]), meant)


def held_bytes(entry: PackedEntry, rows: Sequence[tuple[int, int]], columns: tuple[int, int]) -> int:
    """Of those rows and columns. The largest of a block are held in fp32 where the file has them quantised too."""
    width, block = entry.shape[1], entry.options["blocksize"]
    blocks = sum(-(-last * width // block) - first * width // block for first, last in rows)
    if width % block == 0:
        blocks = blocks * block // width * (-(-columns[1] // block) - columns[0] // block)
    return blocks * (block // 2 + 4)


def _dense(part: Tensor) -> Tensor:
    """Its elements alone, one after the other: the package's kernels heed no strides, which a single column flattened has."""
    return part.clone(memory_format=torch.contiguous_format).flatten()


def _largest(entry: PackedEntry, first: int, last: int, read: Read) -> Tensor:
    """fp32, of blocks that the file has quantised to 8 bits, in blocks of their own."""
    _, name, _, nested_name, code_name = entry.parts
    block, bnb = entry.options["nested_blocksize"], package()
    start, stop = first // block, -(-last // block)
    end = -(-prod(entry.shape) // entry.options["blocksize"])
    state = bnb.QuantState(
        read(nested_name, start, stop), code=read(code_name, 0, 256), blocksize=block, dtype=torch.float32
    )
    found = bnb.dequantize_blockwise(read(name, start * block, min(stop * block, end)), state)
    return (found + entry.options["nested_offset"])[first - start * block : last - start * block].clone()


@cache
def package() -> Any:
    """Raises: UnsupportedError: it is not there."""
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UnsupportedError(
            "NF4 and FP4 weights are read by the package bitsandbytes, which is not installed.",
            "Run pip install bitsandbytes in ComfyUI's environment, or use the fp8, GGUF or half-precision file.",
        ) from None
    return bitsandbytes.functional
