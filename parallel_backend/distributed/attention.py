"""The one seam that knows how tokens are spread: attention over all tokens, from each rank's own.

Kernels come from diffusers' dispatch (flash-attn where it is installed) and torch; none is written here.
Shapes: B batch, L tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from ..errors import ConfigError
from .mesh import Mesh
from .ring import LseKernel, ring_attention
from .stale import Phase, StaleExchange, TokenKV
from .ulysses import heads_to_tokens, tokens_to_heads

DISPATCH_NAMES = {
    "native": AttentionBackendName.NATIVE,
    "flash": AttentionBackendName.FLASH,
    "flash3": AttentionBackendName._FLASH_3,
    "sage": AttentionBackendName.SAGE,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
}
# Kernels of other packages, and the function that diffusers has of each where it is there, fits torch and is new enough.
_PACKAGES = {
    "flash": ("flash_attn", "flash_attn_func"),
    "flash3": ("flash_attn_interface", "flash_attn_3_func"),
    "sage": ("sageattention", "sageattn"),
}
_AMPERE = 8


def resolve_kernel(name: str, device: torch.device, dtype: torch.dtype, ring: bool) -> str:
    """The kernel that `name` stands for here; "auto" takes flash-attn where it is installed and fits, else torch's.

    Raises: ConfigError: the kernel is not installed, needs a GPU, or gives no log-sum-exp where ring needs it.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        runs = device.type == "cuda" and half and _is_there("flash") and _capability(device) >= _AMPERE
        return "flash" if runs else "native"
    if name != "native" and device.type != "cuda":
        raise ConfigError(
            f"Attention kernel {name!r} needs a GPU, and the ranks compute on {device.type}.", "Use 'auto'."
        )
    if name in _PACKAGES and not _is_there(name):
        raise ConfigError(
            f"Attention kernel {name!r} needs the package {_PACKAGES[name][0]}, built for this torch and not too old.",
            "Install it, or use 'auto'.",
        )
    if name in _PACKAGES and not half:
        raise ConfigError(f"Attention kernel {name!r} can't compute in {dtype}.", "Use float16, bfloat16 or 'native'.")
    if ring and name not in ("native", "flash", "flash3"):
        raise ConfigError(
            f"Attention kernel {name!r} gives no log-sum-exp, which ring attention needs.",
            "Use 'auto', 'native' or 'flash' with ring, or ulysses in its place.",
        )
    return name


def _is_there(name: str) -> bool:
    return getattr(attention_dispatch, _PACKAGES[name][1], None) is not None


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def lse_kernel(name: str) -> LseKernel:
    """A kernel (q, k, v) -> (out BLNH, log-sum-exp BLN fp32)."""
    return _native_with_lse if name == "native" else partial(_dispatched_with_lse, DISPATCH_NAMES[name])


def _dispatched_with_lse(backend: AttentionBackendName, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = dispatch_attention_fn(q, k, v, backend=backend, attention_kwargs={"return_lse": True})
    if backend is AttentionBackendName.FLASH:  # gives B, N, L; the others' is turned already
        lse = lse.transpose(1, 2)
    return out, lse.float()


def _native_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32 or _capability(q.device) < _AMPERE:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, compute_log_sumexp=True)[:2]
        lse = lse[:, :, : q.shape[2]]  # this kernel pads the queries of its log-sum-exp to its block size
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out.transpose(1, 2), lse.transpose(1, 2)


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


class ParallelAttention:
    """attention(q, k, v, token_counts) over a mesh: ulysses inside, ring around it.

    Args:
        kernel: a name that `resolve_kernel` returned.
    """

    def __init__(self, mesh: Mesh, kernel: str) -> None:
        self.mesh = mesh
        self.kernel = kernel
        self.lse_kernel = lse_kernel(kernel) if mesh.ring.degree > 1 else None

    def __call__(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        token_counts: Sequence[int],
        memory: Memory | None = None,
    ) -> Tensor:
        """What this rank's tokens take from the tokens of all ranks.

        Args:
            q_BLNH, k_BLNH, v_BLNH: this rank's tokens; their order among ranks doesn't matter.
            token_counts: tokens of each sequence-parallel rank, ring outer, ulysses inner.
            memory: more tokens than these; None in exact jobs.
        Returns: (B, L, N, H), this rank's tokens.
        Comm: ulysses: two all-to-all; ring: degree - 1 exchanges of keys and values; and the memory's.
        """
        ring, ulysses = self.mesh.ring, self.mesh.ulysses
        own = in_ring_rank(token_counts, self.mesh)
        ring_counts: list[int] | None = by_ring(token_counts, self.mesh)
        heads = q_BLNH.shape[2]
        if ulysses.degree == 1:
            q, k, v = q_BLNH, k_BLNH, v_BLNH
        else:
            q, k, v = tokens_to_heads(torch.stack([q_BLNH, k_BLNH, v_BLNH]), own, ulysses).unbind(0)
        if memory is not None:
            k, v, ring_counts = memory.keys(k, v)
        if self.lse_kernel is not None and ring_counts is not None:
            out = ring_attention(q, k, v, ring_counts, ring, self.lse_kernel)
        else:
            out = dispatch_attention_fn(q, k, v, backend=DISPATCH_NAMES[self.kernel])
        return heads_to_tokens(out, own, heads, ulysses)


def by_ring(token_counts: Sequence[int], mesh: Mesh) -> list[int]:
    """Tokens of each ring rank, from those of each sequence-parallel rank."""
    degree = mesh.ulysses.degree
    return [sum(token_counts[i * degree : (i + 1) * degree]) for i in range(mesh.ring.degree)]


def in_ring_rank(token_counts: Sequence[int], mesh: Mesh) -> list[int]:
    """Tokens of each ulysses rank of this ring rank, from those of each sequence-parallel rank."""
    first = mesh.ring.rank * mesh.ulysses.degree
    return list(token_counts[first : first + mesh.ulysses.degree])
