"""Ulysses: tokens are exchanged for heads before attention, and back after it.

Source: DeepSpeed-Ulysses (Jacobs et al. 2023). Heads and tokens that don't divide travel in parts of unequal length, so nothing is
padded. Messages lie tokens outside, rows inside: what comes from all ranks lies one after the other as one tensor.
Shapes: B batch, L tokens, N heads of all ranks, n of this one, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .collectives import all_to_all, split_sizes
from .mesh import MeshAxis


def tokens_to_heads(
    sent: Tensor, token_counts: Sequence[int], rows: int, heads: int, head_dim: int, axis: MeshAxis
) -> Tensor:
    """All the axis's tokens for this rank's share of the heads.

    Args:
        sent: this rank's tokens as `join_heads` lays them, in as many parts as the axis has ranks.
        token_counts: tokens of each axis rank.
        heads: N.
    Returns: (sum(token_counts), B, 3, n, H).
    Comm: one all-to-all, (degree - 1) / degree of `sent`.
    """
    shares = split_sizes(heads, axis.degree)
    own, a_head = shares[axis.rank], rows * 3 * head_dim
    leaving = [n * token_counts[axis.rank] * a_head for n in shares]
    received = all_to_all(sent, leaving, [own * count * a_head for count in token_counts], axis)
    return received.view(sum(token_counts), rows, 3, own, head_dim)


def heads_to_tokens(x_BLnH: Tensor, token_counts: Sequence[int], heads: int, axis: MeshAxis) -> Tensor:
    """The inverse: this rank's tokens with all heads, of each rank's heads in turn (L, B, n, H), flat: see `part_heads`.

    Comm: one all-to-all, (degree - 1) / degree of x.
    """
    B, _, own, H = x_BLnH.shape
    tokens = token_counts[axis.rank]
    shares = split_sizes(heads, axis.degree)
    sent = x_BLnH.transpose(0, 1).reshape(-1)  # of one row, as it lies
    return all_to_all(sent, [count * B * own * H for count in token_counts], [tokens * B * n * H for n in shares], axis)
