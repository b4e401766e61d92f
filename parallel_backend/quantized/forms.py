"""What the quantised forms' bytes mean: from a tensor's parts to its values.

A part is a range of rows with some columns, whole units of both. Shapes: R rows, K columns of values, S bytes of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..checkpoint_files.gguf_file import gguf_package
from ..checkpoint_files.packed_entries import FORMS, TILE
from ..errors import UnsupportedError


class Form(ABC):
    """How values lie in tensors of a file. `multiplies`: products are made by its own kernel, which ComfyUI uses too."""

    multiplies = False

    @abstractmethod
    def values(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(R, ...) in that dtype, on the tensors' device."""

    def product(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """x times all values' transpose, and the bias, by that kernel."""
        raise NotImplementedError


class Plain(Form):
    """Not quantised: for rows between quantised ones."""

    def values(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return tensors[0].to(dtype)


class ScaledFP8(Form):
    """fp8 with a factor for all values, or one for each row; without one the numbers are the values.

    A third tensor is a factor for what comes into a product.

    Args:
        in_full: products are of values, whatever the card could do: the file's maker said so.
        multiplies: products are made in fp8.
    """

    def __init__(self, in_full: bool = False, multiplies: bool = False) -> None:
        self.in_full, self.multiplies = in_full, multiplies

    def values(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        values = tensors[0].to(dtype)
        if len(tensors) == 1:
            return values
        scale = tensors[1]
        if scale.numel() == 1:
            return values.mul_(scale.to(dtype).reshape(()))
        return values.mul_(
            scale.float().reshape(-1, *[1] * (values.ndim - 1))
        )  # small ones are coarse in half precision

    def in_fp8(self, tensors: Sequence[Tensor], bare: bool) -> tuple[ScaledFP8, tuple[Tensor, ...]] | None:
        """The form that makes products in fp8, as ComfyUI makes them, and all that it needs; None where these tensors don't suit.

        Args:
            bare: also where values have no factor.
        Raises: UnsupportedError: the package of the kernels is not there.
        """
        data, *scales = tensors
        fits = data.ndim == 2 and data.dtype == torch.float8_e4m3fn and not any(n % 16 for n in data.shape)
        if self.in_full or not fits or not (scales or bare) or any(scale.numel() != 1 for scale in scales):
            return None
        kitchen()
        one = torch.ones((), device=data.device)
        found = [scale.reshape(()).float() for scale in scales] + [one] * (2 - len(scales))
        return ScaledFP8(multiplies=True), (data, *found)

    def product(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """x is rounded to fp8 too, divided by the third tensor."""
        data, scale, incoming = tensors
        layout, kind = kitchen().TensorCoreFP8Layout, "TensorCoreFP8Layout"
        rows = kitchen().QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), kind, scale=incoming)
        params = layout.Params(scale=scale, orig_dtype=x.dtype, orig_shape=tuple(data.shape))
        within = None if x.dtype == torch.float32 else bias  # CUDA's product in fp8 adds no bias of fp32
        out = F.linear(rows, kitchen().QuantizedTensor(data, kind, params), within).reshape(
            *x.shape[:-1], data.shape[0]
        )
        return out if bias is None or within is not None else out + bias


class Kitchen(Form):
    """A form of comfy-kitchen's, ComfyUI's own kernels.

    Args:
        kind: int8_tensorwise, nvfp4 or mxfp8. options: as `comfy_quant` says them.
    Raises: UnsupportedError: the package is not there.
    """

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self.kind, self.options = kind, options
        self.multiplies = kind == "int8_tensorwise"
        self._tensor = kitchen()

    def values(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        data, scale, *rest = tensors
        shape = (data.shape[0], data.shape[1] * (2 if self.kind == "nvfp4" else 1))
        common = {"orig_dtype": dtype, "orig_shape": shape}
        if self.kind == "int8_tensorwise":
            return self._int8(tensors, dtype).dequantize()
        if self.kind == "nvfp4":
            layout = self._tensor.TensorCoreNVFP4Layout
            params = layout.Params(scale=rest[0].reshape(()), block_scale=scale.view(torch.float8_e4m3fn), **common)
        else:
            layout = self._tensor.TensorCoreMXFP8Layout
            params = layout.Params(scale=scale.view(torch.float8_e8m0fnu), **common)
        return layout.dequantize(data, params)

    def product(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Of int8, for which x is rounded to 8 bits too, row by row."""
        return F.linear(x, self._int8(tensors, x.dtype), bias)

    def _int8(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Any:
        data, scale = tensors
        options: dict[str, Any] = {"scale": scale, "orig_dtype": dtype, "orig_shape": tuple(data.shape)}
        if self.options.get("convrot"):
            options |= {"convrot": True, "convrot_groupsize": int(self.options.get("convrot_groupsize", 256))}
        params = self._tensor.TensorWiseINT8Layout.Params(**options)
        return self._tensor.QuantizedTensor(data, "TensorWiseINT8Layout", params)


class GGUF(Form):
    """A type of llama.cpp's: blocks of 32 or 256 values, one after the other.

    Dequantised by diffusers' functions in half precision, as these and ComfyUI-GGUF do.

    Args:
        kind: as gguf names it, such as Q4_K.
        run: where rows of values begin and end inside of blocks: how many values of the first block come before them, and
            the rows' shape. None where each row of the data is one of the values.
    Raises: UnsupportedError: no gguf package.
    """

    def __init__(self, kind: str, run: tuple[int, tuple[int, ...]] | None = None) -> None:
        self.kind, self.run = kind, run
        self._function = _gguf_functions()[kind]
        gguf = gguf_package()
        self._block, self._bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]

    def values(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        (data_RS,) = tensors
        with _KeptConstants():
            values = self._function(data_RS.reshape(-1, self._bytes), self._block, self._bytes).half()
        if self.run is None:
            return values.reshape(data_RS.shape[0], -1).to(dtype)
        return rows_within(values, *self.run).to(dtype)


def rows_within(blocks: Tensor, before: int, shape: tuple[int, ...]) -> Tensor:
    """Rows of that shape which begin after so many values of whole blocks, and may end inside of one."""
    return blocks.reshape(-1)[before : before + prod(shape)].reshape(shape)


class _KeptConstants(TorchFunctionMode):
    """What is made of Python's numbers below it stays on its device: to make it there is a copy that the host waits for."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and isinstance(args[0], list):
            return constant(tuple(args[0]), **kwargs)
        return func(*args, **(kwargs or {}))


@cache
def constant(values: tuple[float, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that nobody changes."""
    return torch.tensor(values, dtype=dtype).to(device)


def form_of(kind: str, options: Mapping[str, Any]) -> Form:
    """Of ComfyUI's. Raises: UnsupportedError: its package is not there."""
    if kind.startswith("float8"):
        return ScaledFP8(in_full=bool(options.get("full_precision_matrix_mult")))
    return Kitchen(kind, options)


def scale_columns(kind: str, scale: Tensor, start: int, stop: int) -> Tensor:
    """Of a tiled tensor of scales the tiles of the values' columns `start` to `stop`, tile borders both."""
    rows, blocks = TILE
    tiles = scale.contiguous().view(scale.shape[0] // rows, -1, rows * blocks)
    width = blocks * FORMS[kind].block
    kept = tiles[:, start // width : -(-stop // width)]
    return kept.reshape(scale.shape[0], kept.shape[1] * blocks)


def is_known(kind: str) -> bool:
    """Whether a type of GGUF's can stay quantised: a function for devices knows it."""
    return kind in _gguf_functions()


@cache
def kitchen() -> Any:
    """ComfyUI's own kernels. Raises: UnsupportedError: they are not installed."""
    try:
        import comfy_kitchen.tensor
    except ImportError:
        raise UnsupportedError(
            "int8, nvfp4 and mxfp8 weights are read by the package comfy-kitchen, which is not installed.",
            "Run pip install comfy-kitchen in ComfyUI's environment, or use the fp8 or half-precision file.",
        ) from None
    return comfy_kitchen.tensor


@cache
def _gguf_functions() -> dict[str, Any]:
    """From blocks to values, by type."""
    gguf_package()  # which the module below can't do without
    from diffusers.quantizers.gguf.utils import dequantize_functions

    return {quantisation.name: function for quantisation, function in dequantize_functions.items()}
