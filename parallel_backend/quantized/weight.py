"""A weight that stays quantised: whoever computes with it gets its values, made for that moment.

Products laid on it (LoRA) are kept beside the quantised matrix and added to its values: it is never quantised again.
Shapes: R rows, K columns; a kernel counts as a matrix, all dims after the first as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from .forms import Form, Plain, ScaledFP8

# What tells of the weight and computes nothing.
_TELLING = frozenset({"numel", "size", "dim", "element_size", "nelement", "is_floating_point", "__len__"})


@dataclass(frozen=True)
class Part:
    """Some rows of a weight, quantised in one form.

    Args:
        tensors: as the form takes them.
        rows, columns: first and one past last of the form's values that are meant, since a file gives whole units only; None is
            all columns.
    """

    form: Form
    tensors: tuple[Tensor, ...]
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    def values(self, dtype: torch.dtype) -> Tensor:
        values = self.form.values(self.tensors, dtype)[slice(*self.rows)]
        return values if self.columns is None else values[:, slice(*self.columns)]

    @property
    def multiplies(self) -> bool:
        """Whether the form's own kernel can make products with it: of whole units of columns."""
        return self.form.multiplies and self.columns is None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times its values' transpose, and the bias, by that kernel."""
        if self.rows == (0, self.tensors[0].shape[0]):
            return self.form.product(x, self.tensors, bias)
        out = self.form.product(x, self.tensors, None)[..., slice(*self.rows)]
        return out if bias is None else out + bias


@dataclass(frozen=True)
class Product:
    """up @ down, times `scale`, for the weight's rows `rows`. up: (rows, rank). down: (rank, K)."""

    rows: slice
    up: Tensor
    down: Tensor
    scale: float


class QuantizedWeight(torch.Tensor):
    """Looks like a parameter of `dtype` and is one for all that only use it: torch's functions get its values.

    Args:
        parts: one below the other. shape: of all.
    """

    parts: tuple[Part, ...]
    products: tuple[Product, ...]
    instead: Tensor | None
    _is_param = True  # a module takes it for one of its parameters

    @staticmethod
    def __new__(cls, parts: Sequence[Part], shape: Sequence[int], dtype: torch.dtype) -> QuantizedWeight:
        device = parts[0].tensors[0].device
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.parts, made.products, made.instead = tuple(parts), (), None
        return made

    def dequantized(self) -> Tensor:
        """The values, with what lies on them."""
        if self.instead is not None:
            return self.instead
        values = [part.values(self.dtype) for part in self.parts]
        whole = values[0] if len(values) == 1 else torch.cat(values)
        for product in self.products:
            matrix = whole.view(whole.shape[0], -1) if whole.is_contiguous() else whole
            matrix[product.rows].addmm_(product.up, product.down, alpha=product.scale)
        return whole.reshape(self.shape)

    def wear(self, products: Iterable[Product], instead: Tensor | None = None) -> None:
        """These, and no others, lie on it from now on; `instead` takes the place of its values."""
        self.products, self.instead = tuple(products), instead

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As torch's function of that name; each part by its own kernel, where all have one, and what lies on them beside that."""
        if self.instead is not None or not all(part.multiplies for part in self.parts):
            return F.linear(x, self.dequantized(), bias)
        biases = (
            [None] * len(self.parts)
            if bias is None
            else bias.split([part.rows[1] - part.rows[0] for part in self.parts])
        )
        found = [part.product(x, own) for part, own in zip(self.parts, biases, strict=True)]
        out = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        for product in self.products:  # whose middle has no bounds that float16 would keep
            wide = x.float() if x.dtype == torch.float16 else x
            middle = F.linear(wide, product.down.to(wide.dtype))
            out[..., product.rows] += product.scale * F.linear(middle, product.up.to(wide.dtype))
        return out

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in part.tensors)

    def placed(self, place: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype) -> QuantizedWeight:
        """On another device, and of values in another dtype; `place` copies a tensor there."""
        moved = [replace(p, tensors=tuple(place(t, t.dtype) for t in p.tensors)) for p in self.parts]
        return QuantizedWeight(moved, self.shape, dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], cls):
            return args[1].linear(args[0], *args[2:], **kwargs)
        if func is torch.cat and kwargs.get("dim", args[1] if len(args) > 1 else 0) == 0:
            return joined(args[0])
        if func.__name__ in _TELLING or func.__name__ == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*tree_map(_values, tuple(args)), **tree_map(_values, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_values, tuple(args)), **tree_map(_values, kwargs or {}))

    def detach(self) -> QuantizedWeight:
        return self

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        assert not requires_grad, "a quantised weight can't be trained"
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedWeight({list(self.shape)}, {self.held_bytes} bytes)"


def multiply_in_fp8(weight: Tensor, bare: bool) -> bool:
    """Products with the weight are made in fp8 from now on, if its form does that; see ScaledFP8.in_fp8. Returns whether they are."""
    if not isinstance(weight, QuantizedWeight):
        return False
    found = []
    for part in weight.parts:
        if not isinstance(part.form, ScaledFP8) or (faster := part.form.in_fp8(part.tensors, bare)) is None:
            return False
        found.append(replace(part, form=faster[0], tensors=faster[1]))
    weight.parts = tuple(found)
    return True


def joined(weights: Sequence[Tensor]) -> QuantizedWeight:
    """One below the other; those that are not quantised stay as they are."""
    parts: list[Part] = []
    for weight in weights:
        if isinstance(weight, QuantizedWeight):
            parts += weight.parts
        else:
            parts.append(Part(Plain(), (weight,), (0, weight.shape[0])))
    rows, dtype = (
        sum(weight.shape[0] for weight in weights),
        next(w.dtype for w in weights if isinstance(w, QuantizedWeight)),
    )
    return QuantizedWeight(parts, (rows, *weights[0].shape[1:]), dtype)


def _values(x: Any) -> Any:
    return x.dequantized() if isinstance(x, QuantizedWeight) else x
