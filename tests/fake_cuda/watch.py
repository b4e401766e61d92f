"""Looks at every operation on the device: whether it is allowed, what it launches, what it holds."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# What CPUs compose of other operations and CUDA has a kernel for.
_KERNELS = {"scaled_dot_product_attention", "_fused_rms_norm"}
# Beside views: they give memory, and launch nothing.
_SILENT = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}
# The host reads what they found before it can go on.
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_linalg_check_errors", "linalg_solve", "unique"}
_COPIES = {"_to_copy", "copy_"}


class MixedDevicesError(AssertionError):
    """An operation has tensors of two devices."""


class HostSyncError(AssertionError):
    """The host would wait for the GPU."""


class Watch(TorchDispatchMode):
    """Raises where devices mix or the host would wait; counts launches, collectives and memory.

    Composite operations are taken apart, so that each kernel counts. While `armed` is False, waiting is allowed.
    """

    def __init__(self, *, armed: bool = True) -> None:
        super().__init__()
        self.armed = armed
        self.launches: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.memory = Memory()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to keep that off costs more than the rest

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func.namespace, func._opname
        if space == "prim":
            return func(*args, **kwargs)
        if name not in _KERNELS and _is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        given = _tensors((*args, *kwargs.values()))
        if space == "c10d":
            self.collectives[name] += 1
            return func(*args, **kwargs)
        _check_devices(func, name, given)
        if self.armed:
            non_blocking = args[2:3] == (True,) if name == "copy_" else bool(kwargs.get("non_blocking"))
            _check_waiting(name, given, non_blocking, kwargs)
        result = func(*args, **kwargs)
        made = [x for x in _tensors((result,)) if x.device.type == "cuda"]
        if result is None and func._schema.is_mutable:  # a kernel that writes where it is told
            made = given
        if made and not func.is_view:
            self.launches[name] += name not in _SILENT
            self.memory.hold(made, given)
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among values and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@cache
def _is_composite(func: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), DispatchKey.CompositeImplicitAutograd)


def _check_devices(func: OpOverload, name: str, given: list[Tensor]) -> None:
    """0-dim CPU tensors may be numbers of a pointwise kernel; else one operation has one device, unless it copies."""
    devices = {x.device.type for x in given if x.ndim or torch.Tag.pointwise not in func.tags}
    if len(devices) > 1 and name not in _COPIES:
        raise MixedDevicesError(f"{name} of {sorted(devices)} at {_place()}")


def _check_waiting(name: str, given: list[Tensor], non_blocking: bool, kwargs: dict[str, Any]) -> None:
    devices = [x.device.type for x in given]
    if name in _READ and "cuda" in devices:
        raise HostSyncError(f"{name} at {_place()}")
    if name not in _COPIES:
        return
    source, target = (devices[-1], devices[0]) if name == "copy_" else (devices[0], _device_of(kwargs, devices[0]))
    if source == target or (name == "copy_" and target == "cuda" and given[-1].ndim == 0):
        return
    on_host = given[0] if name == "copy_" and target == "cpu" else given[-1]
    if not (non_blocking and getattr(on_host, "is_pinned_here", False)):
        raise HostSyncError(f"a copy from {source} to {target} at {_place()}")


def _device_of(kwargs: dict[str, Any], otherwise: str) -> str:
    device = kwargs.get("device")
    return otherwise if device is None else device.type


def _place() -> str:
    """The line of the project that called."""
    for frame in reversed(traceback.extract_stack()):
        if "/parallel_backend/" in frame.filename or "/diffusers/" in frame.filename or "test_" in frame.filename:
            return f"{frame.filename.split('/', frame.filename.count('/') - 2)[-1]}:{frame.lineno} ({frame.line})"
    return "a place unknown"


class Memory:
    """Bytes that the tensors of a device hold, each until the last that views it is gone."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def hold(self, made: list[Tensor], given: list[Tensor]) -> None:
        """What was made beside what was given."""
        old = {x.untyped_storage()._cdata for x in given}
        for x in made:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._storages and key not in old:
                nbytes = storage.nbytes()
                self._storages[key] = weakref.ref(storage, lambda _, key=key, n=nbytes: self._let_go(key, n))
                self.held += nbytes
        self.peak = max(self.peak, self.held)

    def _let_go(self, key: int, nbytes: int) -> None:
        del self._storages[key]
        self.held -= nbytes
