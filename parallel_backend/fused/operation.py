"""A kernel of our own as one operation of torch: a plain twin says what it computes, on CUDA a Triton kernel computes it.

CPUs run the twin, and so does training. A GPU runs the kernel, once this has been tried there beside its twin; where it fails, the twin as well.
As an operation it is one launch to whoever counts, compiles or captures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import in_a_line

log = logging.getLogger("parallel_backend")

_LIBRARY = torch.library.Library("parallel_mmdit", "DEF")
# After CUDA's own errors nothing else works either. torch 2.8 has given them this class.
_CONTEXT_LOST = (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()
# What half precision's last bit may differ by, of values of about 1.
_TOLERANCE = 2e-2


class Fused:
    """`fused(*arguments)` is `plain(*arguments)`, in one kernel where there is one."""

    def __init__(
        self,
        name: str,
        schema: str,
        plain: Callable[..., Any],
        launch: Callable[..., Any],
        trial: Callable[[torch.device], Sequence[Any]],
    ) -> None:
        """
        Args:
            schema: of its arguments and results, as torch writes an operation's: "(Tensor x, float eps) -> Tensor". One without
                results writes into its last argument.
            launch: as `plain`, by a Triton kernel; it imports triton when it is called.
            trial: arguments to try it with, on that device.
        """
        self.name, self.plain, self.launch, self.trial = name, plain, launch, trial
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, self._on_gpu, "CUDA")
        torch.library.register_fake(f"parallel_mmdit::{name}", plain, lib=_LIBRARY)
        self._operation = getattr(torch.ops.parallel_mmdit, name)

    def __call__(self, x: Tensor, *others: Any) -> Any:
        by_twin = x.device.type in ("cpu", "meta") or torch.is_grad_enabled()  # kernels have no gradients
        return self.plain(x, *others) if by_twin else self._operation(x, *others)

    def tried(self, compute: Callable[..., Any], device: torch.device) -> list[Tensor]:
        """The trial's results; of what writes where it is told, its last argument."""
        arguments = self.trial(device)
        result = compute(*arguments)
        return tree_leaves(arguments[-1] if result is None else result)

    def _on_gpu(self, x: Tensor, *others: Any) -> Any:
        compute = self.launch if fault_of(self, x.device) is None else self.plain
        return compute(x, *others)


@lru_cache(maxsize=64)
def fault_of(fused: Fused, device: torch.device) -> str | None:
    """What is wrong with its kernel on that GPU; None where it gives what the twin gives. It is tried once.

    Raises: OutOfMemoryError: torch's, which says nothing about the kernel.
    """
    fault = None
    try:
        results = [fused.tried(compute, device) for compute in (fused.launch, fused.plain)]
        for found, wanted in zip(*results, strict=True):
            worst = float((found.float() - wanted.float()).abs().max())
            if not worst <= _TOLERANCE:
                fault = f"gave wrong numbers (off by {worst:.2g})"
    except Exception as error:
        if isinstance(error, (torch.OutOfMemoryError, *_CONTEXT_LOST)):
            raise
        fault = f"failed ({in_a_line(error)})"
    if fault is not None:
        log.warning("fused kernel %s %s on %s: plain operations compute in its place", fused.name, fault, device)
    return fault


def note_of(kernels: Iterable[Fused], device: torch.device) -> str:
    """What the user should know of those that don't work on that device; nothing of a CPU, where none is wanted."""
    if device.type != "cuda":
        return ""
    faults = [f"{fused.name!r} {fault}" for fused in kernels if (fault := fault_of(fused, device)) is not None]
    return f"on {device} plain operations compute in place of fused kernels: {'; '.join(faults)}" if faults else ""
