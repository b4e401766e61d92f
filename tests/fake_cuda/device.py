"""One rank of a world whose other ranks aren't there, with a GPU that isn't there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from parallel_backend.fused.group_norm import shares_of
from parallel_backend.quantized import forms

from .stand_ins import stand_ins

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_cuda(rank: int = 0, world_size: int = 1) -> Iterator[None]:
    """Tensors of device cuda are fake, those of the CPU are real; collectives send nothing and are done at once.

    What is received on the CPU is zero. Nothing of it is left in place afterwards.
    """
    assert not dist.is_initialized() and not torch.cuda.is_available()
    with stand_ins(), _FakeDevice():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        _let_go()
        try:
            yield
        finally:
            _let_go()
            dist.destroy_process_group()


def _let_go() -> None:
    """Of tensors that are kept by their device."""
    shares_of.cache_clear()
    forms.constant.cache_clear()


class _FakeDevice(TorchDispatchMode):
    """Tensors that are made on cuda are fake; what is computed of them is so by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to keep that off costs more than the rest

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() == "c10d::recv_":
            for x in args[0]:
                if x.device.type == "cpu":
                    x.zero_()
        if any(isinstance(value, torch.device) and value.type == "cuda" for value in (*args, *kwargs.values())):
            args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
            with self._fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _as_fake(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self._fake.from_tensor(x)


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, device=DEVICE, dtype=dtype)


def put_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights as loading leaves them: on the device, in `dtype` but for those that stay fp32, convolutions' channels last."""
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        kept = torch.float32 if getattr(parameter, "fp32", False) else dtype
        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
        weights = torch.empty(parameter.shape, dtype=kept, device=DEVICE, memory_format=layout)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weights, requires_grad=False))
