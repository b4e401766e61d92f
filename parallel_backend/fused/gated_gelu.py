"""The gate of a feed-forward layer: one half of a product times the GELU of its other half.

Source: Shazeer 2020 (arXiv 2002.05202). Shapes: D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operation import Fused


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _launch(x: Tensor) -> Tensor:
    from .gated_gelu_kernel import cdiv, gated_gelu_kernel

    x = x.contiguous()
    D = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], D)
    block = 1024
    gated_gelu_kernel[(out.numel() // D, cdiv(D, block))](x, out, D, BLOCK=block)
    return out


GATED_GELU = Fused(
    "gated_gelu",
    "(Tensor x) -> Tensor",
    _gated,
    _launch,
    lambda device: [torch.linspace(-4, 4, 2 * 3 * 70, device=device).view(3, 2 * 70).half()],
)
