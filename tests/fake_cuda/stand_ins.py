"""What a build of torch without CUDA can't do with a tensor of device cuda, done another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import EllipsisType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

HOPPER = (9, 0)
_CUDA = torch.device("cuda", 0)
_getitem, _setitem, _contiguous, _new_empty, _Generator = (
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.contiguous,
    Tensor.new_empty,
    torch.Generator,
)


def _get(x: Tensor, index: Any) -> Tensor:
    """Indexing by numbers, slices, None and an ellipsis, as views; by lists and tensors, which come to the device first."""
    if x.device.type != "cuda":
        return _getitem(x, index)
    places: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if sum(isinstance(place, list | Tensor) for place in places) > 1:
        raise NotImplementedError("several lists or tensors, which choose together")
    if Ellipsis in places:
        at = places.index(Ellipsis)
        missing = x.ndim - sum(not isinstance(place, EllipsisType | None) for place in places)
        places = (*places[:at], *[slice(None)] * missing, *places[at + 1 :])
    dim = 0
    for place in places:
        if isinstance(place, int):
            x = torch.select(x, dim, place)
            continue
        if place is None:
            x = x.unsqueeze(dim)
        elif isinstance(place, list | Tensor):
            x = torch.ops.aten.index.Tensor(x, [None] * dim + [_on_device(place)])
        else:
            start, stop, step = place.indices(x.shape[dim])
            x = torch.ops.aten.slice(x, dim, start, max(start, stop), step)
        dim += 1
    return x


def _on_device(index: list[int] | Tensor) -> Tensor:
    """As CUDA's kernel takes it: one of the host is copied, and the host waits; of a mask, it reads how many are chosen."""
    index = torch.as_tensor(index)
    if index.ndim != 1:
        raise NotImplementedError(f"an index of {index.ndim} dims")
    if index.dtype == torch.bool:
        index = index.nonzero()[:, 0]
    return index if index.device.type == "cuda" else index.to(_CUDA)


def _set(x: Tensor, index: Any, value: Any) -> None:
    if x.device.type == "cuda" and isinstance(index, list | Tensor):
        torch.ops.aten.index_put_.default(x, [_on_device(index)], value)
    elif x.device.type == "cuda":
        if isinstance(index, tuple) and any(isinstance(place, list | Tensor) for place in index):
            raise NotImplementedError(
                "what lists or tensors choose along a later dim is no view, and can't be written to"
            )
        _get(x, index).copy_(value)
    else:
        _setitem(x, index, value)


def _in_order(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    if x.device.type != "cuda":
        return _contiguous(x, memory_format=memory_format)
    return x if x.is_contiguous(memory_format=memory_format) else x.clone(memory_format=memory_format)


def _pinned(x: Tensor) -> Tensor:
    copy = x.clone()
    copy.is_pinned_here = True  # type: ignore[attr-defined]
    return copy


def _new(x: Tensor, *size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    return _pinned(torch.empty(*size, dtype=x.dtype)) if pin_memory else _new_empty(x, *size, **kwargs)


class _Stream:
    """What is queued on it is done at once."""

    def __init__(self, device: object = None) -> None:
        del device

    def wait_stream(self, other: object) -> None:
        del other

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, **_: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        del stream

    def synchronize(self) -> None:
        pass


def _otherwise(name: str, value: Any) -> Any:
    """Tensor's method of this name for all tensors but those of cuda."""
    own = getattr(Tensor, name)
    return lambda x, *args, **kwargs: (value if x.device.type == "cuda" else own)(x, *args, **kwargs)


def _number(x: Tensor) -> Any:
    return torch.ops.aten._local_scalar_dense(x)


_STAND_INS: list[tuple[Any, str, Any]] = [
    (Tensor, "__getitem__", _get),
    (Tensor, "__setitem__", _set),
    (Tensor, "contiguous", _in_order),
    (Tensor, "pin_memory", _pinned),
    (Tensor, "new_empty", _new),
    (Tensor, "new_tensor", _otherwise("new_tensor", lambda x, data: torch.tensor(data, dtype=x.dtype).to(x.device))),
    (Tensor, "copy_", _otherwise("copy_", torch.ops.aten.copy_)),
    (Tensor, "nonzero", _otherwise("nonzero", torch.ops.aten.nonzero)),
    *((Tensor, name, _otherwise(name, _number)) for name in ("__float__", "__int__", "__bool__", "__index__")),
    (torch, "Generator", lambda device="cpu": _Generator("cpu")),
    (torch.cuda, "_lazy_init", lambda: None),
    (torch.cuda, "Stream", _Stream),
    (torch.cuda, "Event", _Event),
    (torch.cuda, "stream", nullcontext),
    (torch.cuda, "current_stream", _Stream),
    (torch.cuda, "get_device_capability", lambda *_: HOPPER),
]


@contextmanager
def stand_ins() -> Iterator[None]:
    """They are in place; after it, none is."""
    with ExitStack() as stack:
        for owner, name, value in _STAND_INS:
            stack.enter_context(patch.object(owner, name, value))
        yield
