"""Which tensors would be on the CPU if the ranks computed on GPUs: here all are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MARK = "made_on_the_host"
_TO_A_DEVICE = (Tensor.to, Tensor.cuda)


def is_on_host(x: Tensor) -> bool:
    return getattr(x, _MARK, False)


class HostTensors(TorchFunctionMode):
    """Marks the tensors that are made without a word of a device, as long as nothing brings them to one.

    So torch itself decides: `torch.tensor([True])` is on the CPU, `torch.zeros(1, device=self.device)` where the rank
    computes, and what comes of several is where any of them is. Tensors from elsewhere, such as weights, are taken to be on
    the device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, (Tensor, list, tuple)) or isinstance(result, torch.Size):
            return result
        named = kwargs.get("device") is not None or (func in _TO_A_DEVICE and _names_a_device(args[1:]))
        on_host = not named and all(map(is_on_host, _tensors(chain(args, kwargs.values()))))
        for tensor in _tensors([result]):
            if on_host or is_on_host(tensor):
                setattr(tensor, _MARK, on_host)
        return result


def _names_a_device(args: tuple[Any, ...]) -> bool:
    """Of `x.to(...)`. Another tensor does too; where that is on the CPU itself, all that is given is."""
    return any(isinstance(arg, (torch.device, str)) for arg in args)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
