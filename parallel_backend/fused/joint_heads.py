"""Two streams' queries, keys and values as one message for each rank that takes some of their heads, and heads back to streams.

Where one rank has all heads there is one message, and all of this is joining and parting tokens.
Shapes: B rows, L tokens of both streams, N heads of all ranks, n of one of them, H head dim, F = N * H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .operation import Fused

Weights = Sequence[Tensor | None]
# Where a norm has no number of its own: torch's, of the dtype in which it is computed. Half precision's would be a hundredth.
RMS_EPS = torch.finfo(torch.float32).eps


def head_ranges(heads: int, parts: int) -> list[tuple[int, int]]:
    """First and one-past-last head of each part: they differ by at most one, larger ones first."""
    base, more = divmod(heads, parts)
    ends = [part * base + min(part, more) for part in range(parts + 1)]
    return list(pairwise(ends))


def _rates(x_LBNH: Tensor, eps: float | None) -> Tensor:
    """(L, B, N, 1), in fp32: what an RMS norm multiplies each head by, beside its weight."""
    roots = torch.linalg.vector_norm(x_LBNH, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(roots.square() / x_LBNH.shape[-1] + (RMS_EPS if eps is None else eps))


def _join_plain(
    q_BLF: Tensor, others_BLF: Sequence[Tensor], weights_H: Weights, heads: int, parts: int, eps: float | None
) -> Tensor:
    parts_BLF = [q_BLF, *others_BLF]
    streams = [parts_BLF[:3], parts_BLF[3:]]
    B, head_dim = parts_BLF[0].shape[0], parts_BLF[0].shape[2] // heads
    L = sum(stream[0].shape[1] for stream in streams)
    sent = parts_BLF[0].new_empty(3 * B * L * heads * head_dim)
    for number, (x_BLF, weight) in enumerate(zip(parts_BLF, weights_H, strict=True)):
        x_LBNH = x_BLF.unflatten(-1, (heads, head_dim)).transpose(0, 1)
        rates = None if weight is None else _rates(x_LBNH, eps)
        start = 0 if number < 3 else streams[0][0].shape[1]
        ranges = head_ranges(heads, parts)
        for message_LB3NH, (first, last) in zip(_messages(sent, B, L, heads, head_dim, parts), ranges, strict=True):
            place = message_LB3NH[start : start + x_LBNH.shape[0], :, number % 3]
            place.copy_(x_LBNH[:, :, first:last])
            if rates is not None and weight is not None:
                # In place: memory for a tensor more costs a CPU more than another pass.
                place.mul_(rates[:, :, first:last]).mul_(weight)
    return sent


def _messages(sent: Tensor, B: int, L: int, heads: int, head_dim: int, parts: int) -> Iterator[Tensor]:
    """(L, B, 3, n, H) of each part."""
    token = L * B * 3 * head_dim
    for first, last in head_ranges(heads, parts):
        yield sent[first * token : last * token].view(L, B, 3, last - first, head_dim)


def _join_launch(
    q_BLF: Tensor, others_BLF: Sequence[Tensor], weights_H: Weights, heads: int, parts: int, eps: float | None
) -> Tensor:
    import triton

    from .transformer_kernels import join_kernel

    first, second = _alike([q_BLF, *others_BLF[:2]]), _alike(others_BLF[2:])
    B, lengths, head_dim = first[0].shape[0], (first[0].shape[1], second[0].shape[1]), first[0].shape[2] // heads
    sent = first[0].new_empty(3 * B * sum(lengths) * heads * head_dim)
    if sent.numel() == 0:
        return sent
    # A weight that isn't there is never read.
    weights = [
        sent if weight is None else weight for weight in (weights_H[0], weights_H[1], weights_H[3], weights_H[4])
    ]
    assert weights_H[2] is None and weights_H[5] is None, "values have no norm"
    has_norms = [weights_H[i] is not None for i in (0, 3)]
    assert has_norms == [weights_H[i] is not None for i in (1, 4)], "queries and keys have norms, or neither"
    join_kernel[(B * sum(lengths), 3)](
        *(*first, *second, *weights, sent),
        *(*first[0].stride()[:2], *second[0].stride()[:2]),
        *(B, *lengths, RMS_EPS if eps is None else eps),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BASE=heads // parts,
        MORE=heads % parts,
        FIRST_NORM=has_norms[0],
        SECOND_NORM=has_norms[1],
        HEADS_BLOCK=triton.next_power_of_2(heads),
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        num_warps=8,
    )
    return sent


def _alike(stream_BLF: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values that lie in memory in the same way."""
    same = len({x.stride() for x in stream_BLF}) == 1 and stream_BLF[0].stride(-1) == 1
    return list(stream_BLF) if same else [x.contiguous() for x in stream_BLF]


def _join_trial(device: torch.device) -> list[object]:
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(2, length, 3 * 5 * 64, generator=generator).to(device, torch.float16) for length in (3, 7)]
    weight = torch.randn(64, generator=generator).to(device, torch.float16)
    q, *others = (part for stream in streams for part in stream.chunk(3, dim=-1))
    return [q, others, [weight, weight, None] * 2, 5, 2, 1e-6]


JOIN = Fused(
    "join_heads",
    "(Tensor q, Tensor[] others, Tensor?[] weights, int heads, int parts_of_heads, float? eps) -> Tensor",
    _join_plain,
    _join_launch,
    _join_trial,
)


def join_heads(
    first_BLF: Sequence[Tensor],
    second_BLF: Sequence[Tensor],
    first_norms_H: tuple[Tensor | None, Tensor | None],
    second_norms_H: tuple[Tensor | None, Tensor | None],
    *,
    heads: int,
    parts: int,
    eps: float | None,
) -> Tensor:
    """Queries, keys and values of the tokens of the first stream, then of the second: for each part of the heads, one part after
    the other, (L, B, 3, n, H), flat.

    Args:
        first_BLF, second_BLF: queries, keys and values of a stream, which may have no tokens.
        first_norms_H, second_norms_H: weights of the RMS norms of each head's queries and keys; None leaves these as they are.
        eps: of the norms; None is `RMS_EPS`.
    """
    weights = [*first_norms_H, None, *second_norms_H, None]
    return JOIN(first_BLF[0], [*first_BLF[1:], *second_BLF], weights, heads, parts, eps)


def _part_plain(x: Tensor, rows: int, first: int, heads: int, head_dim: int, parts: int) -> tuple[Tensor, Tensor]:
    if x.ndim == 4:
        both_LBNH = x.transpose(0, 1)
    else:
        L = x.numel() // (rows * heads * head_dim)
        token = L * rows * head_dim
        both_LBNH = torch.cat(
            [x[a * token : b * token].view(L, rows, b - a, head_dim) for a, b in head_ranges(heads, parts)], dim=2
        )
    one, two = (both_LBNH[:first], both_LBNH[first:])
    return one.transpose(0, 1).flatten(2).contiguous(), two.transpose(0, 1).flatten(2).contiguous()


def _part_launch(x: Tensor, rows: int, first: int, heads: int, head_dim: int, parts: int) -> tuple[Tensor, Tensor]:
    import triton

    from .transformer_kernels import part_kernel

    L = x.shape[1] if x.ndim == 4 else x.numel() // (rows * heads * head_dim)
    if x.ndim == 4 and (x.stride(3), x.stride(2)) != (1, head_dim):
        x = x.contiguous()
    out = [x.new_empty(rows, length, heads * head_dim) for length in (first, L - first)]
    if x.numel() > 0:
        part_kernel[(rows * L,)](
            *(x, *out),
            *(x.stride(0), x.stride(1)) if x.ndim == 4 else (heads * head_dim, rows * heads * head_dim),
            *(rows, L, first),
            HEADS=heads,
            HEAD_DIM=head_dim,
            BASE=heads // parts,
            MORE=heads % parts,
            IN_PARTS=x.ndim == 1,
            HEADS_BLOCK=triton.next_power_of_2(heads),
            DIM_BLOCK=triton.next_power_of_2(head_dim),
            num_warps=8,
        )
    return out[0], out[1]


def _part_trial(device: torch.device) -> list[object]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 * 10 * 5 * 64, generator=generator).to(device, torch.float16), 2, 3, 5, 64, 2]


PART = Fused(
    "part_heads",
    "(Tensor x, int rows, int first, int heads, int head_dim, int parts) -> (Tensor, Tensor)",
    _part_plain,
    _part_launch,
    _part_trial,
)


def part_heads(x: Tensor, rows: int, first: int, heads: int, head_dim: int, parts: int) -> tuple[Tensor, Tensor]:
    """(B, first, F) and (B, L - first, F): the first tokens and the others, all heads.

    Args:
        x: for each part of the heads, one part after the other, (L, B, n, H), flat; or of all heads (B, L, N, H).
    """
    if x.ndim == 4 and (rows == 1 or first == 0):  # as they lie
        return x[:, :first].flatten(2), x[:, first:].flatten(2)
    return PART(x, rows, first, heads, head_dim, parts)
