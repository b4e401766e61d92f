"""Attention over the union of two disjoint sets of keys, from the attention over each.

Source: the log-sum-exp merge of FlashAttention-2 (Dao 2023, arXiv 2307.08691).
Shapes: B rows, L tokens, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operation import Fused


def _plain(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.sigmoid(block_lse - lse).unsqueeze(-1)
    return torch.lerp(out, block_out.float(), weight), torch.logaddexp(lse, block_lse)


def _launch(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    import triton

    from .transformer_kernels import merge_kernel

    out, block_out = (x if x.stride(3) == 1 else x.contiguous() for x in (out, block_out))
    B, L, N, H = out.shape
    merged, merged_lse = out.new_empty(B, L, N, H), lse.new_empty(B, L, N)
    if merged.numel() > 0:
        merge_kernel[(B * L,)](
            *(out, lse, block_out, block_lse, merged, merged_lse),
            *(*out.stride()[:3], *lse.stride(), *block_out.stride()[:3], *block_lse.stride()),
            L,
            HEADS=N,
            HEAD_DIM=H,
            HEADS_BLOCK=triton.next_power_of_2(N),
            DIM_BLOCK=triton.next_power_of_2(H),
            num_warps=8,
        )
    return merged, merged_lse


def _trial(device: torch.device) -> list[object]:
    generator = torch.Generator().manual_seed(0)
    out, block_out = (torch.randn(2, 3, 5, 64, generator=generator).to(device) for _ in range(2))
    lse, block_lse = (torch.randn(2, 5, 3, generator=generator).to(device).transpose(1, 2) for _ in range(2))
    return [out, lse, block_out.half(), block_lse]


MERGE = Fused(
    "merge_attention",
    "(Tensor out, Tensor lse, Tensor block_out, Tensor block_lse) -> (Tensor, Tensor)",
    _plain,
    _launch,
    _trial,
)


def merge_attention(
    out_BLNH: Tensor, lse_BLN: Tensor, block_out_BLNH: Tensor, block_lse_BLN: Tensor
) -> tuple[Tensor, Tensor]:
    """What the queries take from both sets, and its log-sum-exp, in fp32, as the first set's are."""
    return MERGE(out_BLNH, lse_BLN, block_out_BLNH, block_lse_BLN)
