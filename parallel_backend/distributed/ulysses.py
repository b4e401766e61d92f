"""Ulysses: tokens are exchanged for heads before attention, and back after it.

Source: DeepSpeed-Ulysses (Jacobs et al. 2023). Heads and tokens that don't divide travel in parts of unequal
length, so nothing is padded.
Shapes: S stacked tensors, B batch, L tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collectives import all_to_all, split_sizes
from .mesh import MeshAxis


def tokens_to_heads(x_SBLNH: Tensor, token_counts: Sequence[int], axis: MeshAxis) -> Tensor:
    """All the axis's tokens for this rank's share of the heads.

    Args:
        x_SBLNH: this rank's tokens, all heads.
        token_counts: tokens of each axis rank.
    Returns: (S, B, sum(token_counts), N / degree, H).
    Comm: one all-to-all, (degree - 1) / degree of x.
    """
    if axis.degree == 1:
        return x_SBLNH
    S, B, _, N, H = x_SBLNH.shape
    heads = split_sizes(N, axis.degree)
    shapes = [(S, B, L, heads[axis.rank], H) for L in token_counts]
    return torch.cat(all_to_all(x_SBLNH.split(heads, dim=3), shapes, axis), dim=2)


def heads_to_tokens(x_BLNH: Tensor, token_counts: Sequence[int], full_heads: int, axis: MeshAxis) -> Tensor:
    """The inverse: this rank's tokens with all heads.

    Comm: one all-to-all, (degree - 1) / degree of x.
    """
    if axis.degree == 1:
        return x_BLNH
    B, _, _, H = x_BLNH.shape
    shapes = [(B, token_counts[axis.rank], n, H) for n in split_sizes(full_heads, axis.degree)]
    return torch.cat(all_to_all(x_BLNH.split(list(token_counts), dim=1), shapes, axis), dim=2)
