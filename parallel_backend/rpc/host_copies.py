"""Copies between a GPU and this process by way of pinned memory, which torch keeps and gives out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned_like(x: Tensor) -> Tensor:
    """Memory that a GPU reads and writes by itself, for the values of `x`."""
    return x.new_empty(x.shape, device="cpu", pin_memory=True)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on the CPU; all copies from GPUs run together, and are waited for once."""
    copies = [pinned_like(x).copy_(x, non_blocking=True) if x.device.type == "cuda" else x.cpu() for x in tensors]
    for device in {x.device for x in tensors if x.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def onto_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` there. A copy from the CPU to a GPU is queued: nobody waits for it, and `x` may be written again."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return pinned_like(x).copy_(x).to(device, non_blocking=True)
