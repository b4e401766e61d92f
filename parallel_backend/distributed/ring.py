"""Ring attention: keys and values travel round the ring while each rank attends with its own queries.

Source: Ring Attention (Liu et al. 2023), with the log-sum-exp merge of FlashAttention-2.
Shapes: B batch, L tokens, N heads, H head dim; kv is stacked in front, 2BLNH.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..fused.merged_attention import merge_attention
from .collectives import start_ring_exchange
from .mesh import MeshAxis

LseKernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ring_attention(
    q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, token_counts: Sequence[int], axis: MeshAxis, kernel: LseKernel
) -> Tensor:
    """Attention of this rank's queries to the keys and values of every rank of the axis.

    Args:
        token_counts: keys of each axis rank.
        kernel: (q, k, v) -> (out BLNH, log-sum-exp BLN in fp32).
    Comm: (degree - 1) * (k.numel() + v.numel()) elements to the next rank, each sent while a block is computed.
    """
    if axis.degree == 1:
        return kernel(q_BLNH, k_BLNH, v_BLNH)[0]
    kv = torch.stack([k_BLNH, v_BLNH])
    out: Tensor | None = None
    lse: Tensor | None = None
    for turn in range(axis.degree):
        last = turn == axis.degree - 1
        if not last:
            arriving = token_counts[(axis.rank - turn - 1) % axis.degree]
            handle = start_ring_exchange(kv, (2, kv.shape[1], arriving, *kv.shape[3:]), axis)
        if kv.shape[2] and q_BLNH.shape[1]:  # of the fewest tokens, a rank may have none
            block_out, block_lse = kernel(q_BLNH, kv[0], kv[1])
            out, lse = merge(out, lse, block_out, block_lse)
        if not last:
            kv = handle.wait()
    return q_BLNH.new_zeros(q_BLNH.shape) if out is None else out.to(q_BLNH.dtype)


def merge(out: Tensor | None, lse: Tensor | None, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each, in fp32."""
    if out is None or lse is None:
        return block_out.float(), block_lse
    return merge_attention(out, lse, block_out, block_lse)
