"""The one seam that knows how tokens are spread: attention over all tokens, from each rank's own.

Shapes: B batch, L tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..fused.joint_heads import part_heads
from .collectives import split_range
from .kernels import KERNELS, attend
from .mesh import Mesh
from .ring import ring_attention
from .stale import Phase, StaleExchange, TokenKV
from .ulysses import heads_to_tokens, tokens_to_heads


class Memory(Protocol):
    """What an attention knows beside the tokens of this evaluation."""

    def keys(self, k_BLNH: Tensor, v_BLNH: Tensor) -> tuple[Tensor, Tensor, list[int] | None]:
        """Keys and values to attend to, and how many each ring rank has; None where these are all there are."""
        ...


@dataclass(frozen=True)
class PipelinedKV:
    """In a pipeline of patches: fresh keys and values of this patch, the last ones of the others.

    Args:
        ring_counts: tokens of each ring rank, all segments.
    """

    kept: TokenKV
    present: Sequence[int]
    ring_counts: list[int]

    def keys(self, k_BLNH: Tensor, v_BLNH: Tensor) -> tuple[Tensor, Tensor, list[int] | None]:
        return *self.kept.update(k_BLNH, v_BLNH, self.present), self.ring_counts


@dataclass(frozen=True)
class StaleKV:
    """In displaced steps of ring ranks: fresh keys and values of this rank, last step's of the others.

    Source: DistriFusion (Li et al. 2024, arXiv 2402.19481), section 4.2, on tokens.
    Comm: as `StaleExchange.joined`.
    """

    exchange: StaleExchange
    slot: Hashable
    phase: Phase
    ring_counts: list[int]

    def keys(self, k_BLNH: Tensor, v_BLNH: Tensor) -> tuple[Tensor, Tensor, list[int] | None]:
        own = torch.stack([k_BLNH, v_BLNH])
        k, v = self.exchange.joined(self.slot, own, 2, self.ring_counts, self.phase).unbind(0)
        return k, v, None


@dataclass(frozen=True)
class AddedKV:
    """Keys and values that belong to no rank's tokens, 2BTNH, of all heads that ranks of ulysses share."""

    kv_2BTNH: Tensor
    mesh: Mesh
    ring_counts: list[int]

    def keys(self, k_BLNH: Tensor, v_BLNH: Tensor) -> tuple[Tensor, Tensor, list[int] | None]:
        """In a ring, its first rank has them."""
        ring, ulysses = self.mesh.ring, self.mesh.ulysses
        counts = [self.ring_counts[0] + self.kv_2BTNH.shape[2], *self.ring_counts[1:]]
        if ring.rank > 0:
            return k_BLNH, v_BLNH, counts
        first, last = split_range(self.kv_2BTNH.shape[3], ulysses.degree, ulysses.rank)
        k_ip, v_ip = self.kv_2BTNH[:, :, :, first:last].unbind(0)
        return torch.cat([k_BLNH, k_ip], dim=1), torch.cat([v_BLNH, v_ip], dim=1), counts


@dataclass(frozen=True)
class Joined:
    """This rank's queries, keys and values of two streams, as `join_heads` lays them for the ranks of ulysses.

    Args:
        lengths: tokens of each stream.
        heads: N, of all ranks of ulysses.
    """

    sent: Tensor
    rows: int
    lengths: tuple[int, int]
    heads: int
    head_dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, N, H."""
        return self.rows, self.heads, self.head_dim


class ParallelAttention:
    """Attention over a mesh: ulysses inside, ring around it.

    Args:
        kernel: a name in `KERNELS` that works on this rank.
    """

    def __init__(self, mesh: Mesh, kernel: str) -> None:
        self.mesh = mesh
        self.kernel = kernel
        self.lse_kernel = KERNELS[kernel].lse if mesh.ring.degree > 1 else None

    def alone(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """As a call, where this rank has all tokens."""
        rows, heads, head_dim = joined.sizes
        q, k, v = joined.sent.view(-1, rows, 3, heads, head_dim).permute(2, 1, 0, 3, 4).unbind(0)
        return part_heads(attend(self.kernel, q, k, v), rows, joined.lengths[0], heads, head_dim, 1)

    def __call__(
        self, joined: Joined, token_counts: Sequence[int], memory: Memory | None = None
    ) -> tuple[Tensor, Tensor]:
        """What this rank's tokens take from the tokens of all ranks.

        Args:
            joined: this rank's tokens; their order among ranks doesn't matter.
            token_counts: tokens of each sequence-parallel rank, ring outer, ulysses inner.
            memory: more tokens than these; None in exact jobs.
        Returns: (B, L, N * H), of each stream.
        Comm: ulysses: two all-to-all; ring: degree - 1 exchanges of keys and values; and the memory's.
        """
        ring, ulysses, (rows, heads, head_dim) = self.mesh.ring, self.mesh.ulysses, joined.sizes
        own = in_ring_rank(token_counts, self.mesh)
        ring_counts: list[int] | None = by_ring(token_counts, self.mesh)
        qkv_LB3nH = tokens_to_heads(joined.sent, own, rows, heads, head_dim, ulysses)
        q, k, v = qkv_LB3nH.permute(2, 1, 0, 3, 4).unbind(0)
        if memory is not None:
            k, v, ring_counts = memory.keys(k, v)
        if self.lse_kernel is not None and ring_counts is not None:
            out = ring_attention(q, k, v, ring_counts, ring, self.lse_kernel)
        else:
            out = attend(self.kernel, q, k, v)
        if ulysses.degree > 1:
            out = heads_to_tokens(out, own, heads, ulysses)
        return part_heads(out, rows, joined.lengths[0], heads, head_dim, ulysses.degree)


def by_ring(token_counts: Sequence[int], mesh: Mesh) -> list[int]:
    """Tokens of each ring rank, from those of each sequence-parallel rank."""
    degree = mesh.ulysses.degree
    return [sum(token_counts[i * degree : (i + 1) * degree]) for i in range(mesh.ring.degree)]


def in_ring_rank(token_counts: Sequence[int], mesh: Mesh) -> list[int]:
    """Tokens of each ulysses rank of this ring rank, from those of each sequence-parallel rank."""
    first = mesh.ring.rank * mesh.ulysses.degree
    return list(token_counts[first : first + mesh.ulysses.degree])
