"""Layer norm without weights of its own, shifted and scaled row by row: once, or twice in different ways.

Source: adaLN, Peebles and Xie 2022 (arXiv 2212.09748).
Shapes: B rows, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operation import Fused


def _plain(x_BLD: Tensor, shifts_B1D: Sequence[Tensor], scales_B1D: Sequence[Tensor], eps: float) -> list[Tensor]:
    normed = F.layer_norm(x_BLD, (x_BLD.shape[-1],), eps=eps)
    pairs = zip(shifts_B1D, scales_B1D, strict=True)
    return [torch.addcmul(shift, normed, 1 + scale) for shift, scale in pairs]


def _launch(x_BLD: Tensor, shifts_B1D: Sequence[Tensor], scales_B1D: Sequence[Tensor], eps: float) -> list[Tensor]:
    import triton

    from .transformer_kernels import modulated_norm_kernel

    x = x_BLD.contiguous()
    B, L, D = x.shape
    out = [torch.empty_like(x) for _ in shifts_B1D]
    if x.numel() == 0:
        return out
    given = [vector if vector.stride(-1) == 1 else vector.contiguous() for vector in (*shifts_B1D, *scales_B1D)]
    shifts, scales = given[: len(out)], given[len(out) :]
    block = triton.next_power_of_2(D)
    modulated_norm_kernel[(B * L,)](
        *(x, shifts[0], scales[0], out[0], shifts[-1], scales[-1], out[-1]),
        *(vector.stride(0) for vector in (shifts[0], scales[0], shifts[-1], scales[-1])),
        *(L, D, eps),
        TWICE=len(out) == 2,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
    )
    return out


def _trial(device: torch.device) -> list[object]:
    generator = torch.Generator().manual_seed(0)
    x, *vectors = (
        torch.randn(2, length, 1216, generator=generator).to(device, torch.float16) for length in (5, 1, 1, 1, 1)
    )
    return [x, vectors[:2], vectors[2:], 1e-6]


MODULATED_NORM = Fused(
    "modulated_norm", "(Tensor x, Tensor[] shifts, Tensor[] scales, float eps) -> Tensor[]", _plain, _launch, _trial
)


def modulated_norm(x_BLD: Tensor, eps: float, *shifts_and_scales: tuple[Tensor, Tensor]) -> list[Tensor]:
    """layer_norm(x) * (1 + scale) + shift, (B, L, D), for each of one or two pairs of (B, 1, D)."""
    shifts, scales = ([pair[i] for pair in shifts_and_scales] for i in range(2))
    return MODULATED_NORM(x_BLD, shifts, scales, eps)
