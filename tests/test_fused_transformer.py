"""The transformers' fused kernels give what their twins give, in Triton's interpreter; twins give what plain words say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parallel_backend.fused.joint_heads import JOIN, PART, head_ranges, join_heads, part_heads
from parallel_backend.fused.merged_attention import MERGE
from parallel_backend.fused.modulated_norm import MODULATED_NORM, modulated_norm
from parallel_backend.fused.operation import Fused

# Of the greatest value: two roundings more than one.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ROWS, HEADS = 2, 5


def stream(tokens: int, head_dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, as one product gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, tokens, 3 * HEADS * head_dim, generator=generator).to(dtype).chunk(3, dim=-1)


def norms(head_dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (1 + 0.2 * torch.randn(2, head_dim, generator=generator)).to(dtype)
    return q, k


def join_arguments(
    tokens: tuple[int, int], head_dim: int, parts: int, normed: tuple[bool, bool], dtype: torch.dtype
) -> list[Any]:
    q, *others = (*stream(tokens[0], head_dim, dtype, 1), *stream(tokens[1], head_dim, dtype, 2))
    weights = [
        (*norms(head_dim, dtype, 3 + i), None) if is_normed else (None,) * 3 for i, is_normed in enumerate(normed)
    ]
    return [q, others, [*weights[0], *weights[1]], HEADS, parts, 1e-6]


def modulated_arguments(tokens: int, width: int, pairs: int, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, tokens, width, generator=generator).to(dtype)
    vectors = (
        torch.randn(ROWS, 1, 2 * pairs * width, generator=generator).to(dtype).split(width, dim=2)
    )  # as they are kept
    return [x, list(vectors[:pairs]), list(vectors[pairs:]), 1e-6]


def merge_arguments(tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Each laid out in another way, as attention kernels give them."""
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(ROWS, HEADS, tokens, head_dim, generator=generator).transpose(1, 2)
    block = torch.randn(ROWS, tokens, HEADS, head_dim, generator=generator).to(dtype)
    lse = torch.randn(ROWS, tokens, HEADS, generator=generator)
    return [out, lse, block, torch.randn(ROWS, HEADS, tokens, generator=generator).transpose(1, 2)]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.numel():
        error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error <= TOLERANCES[wanted.dtype], float(error)


def test_a_norm_without_a_number_of_its_own_has_that_of_torch() -> None:
    """Of fp32, in which it is computed: half precision's would halve queries as small as these."""
    qkv, weights, head_dim = {}, {}, 64
    for dtype in TOLERANCES:
        qkv[dtype], weights[dtype] = [0.02 * x for x in stream(6, head_dim, dtype, 1)], norms(head_dim, dtype, 3)
    tried = {
        dtype: [q, [*kv, *(x[:, :0] for x in (q, *kv))], [*weights[dtype], None] * 2, HEADS, 1, None]
        for dtype, (q, *kv) in qkv.items()
    }
    by_kernel = interpreted([(JOIN, arguments) for arguments in tried.values()])
    for (dtype, arguments), found in zip(tried.items(), by_kernel, strict=True):
        for sent in (JOIN.plain(*arguments), found):
            found_LB3NH = sent.view(6, ROWS, 3, HEADS, head_dim)
            for part, weight in enumerate(weights[dtype]):
                x_LBNH = qkv[dtype][part].unflatten(-1, (HEADS, head_dim)).transpose(0, 1)
                assert_close(found_LB3NH[:, :, part], F.rms_norm(x_LBNH, (head_dim,), weight))


def cases() -> Iterator[tuple[Fused, list[Any]]]:
    """Of every kernel, with the arguments that it is tried with: all sizes in fp32, one that fills no block in the others."""
    tokens, every = [(0, 3), (2, 3), (1, 0)], [(8, 1), (8, 2), (12, 3), (64, 5)]
    for dtype in TOLERANCES:
        sizes = every if dtype == torch.float32 else [(12, 3)]
        for (head_dim, parts), lengths in product(sizes, tokens):
            for normed in [(True, True), (False, True), (False, False)]:
                yield JOIN, join_arguments(lengths, head_dim, parts, normed, dtype)
            flat = torch.randn(ROWS * sum(lengths) * HEADS * head_dim).to(dtype)
            strided = torch.randn(ROWS, HEADS, sum(lengths), head_dim).to(dtype).transpose(1, 2)
            for x, degree in ((flat, parts), (strided, 1)):
                yield PART, [x, ROWS, lengths[0], HEADS, head_dim, degree]
        apart = join_arguments((2, 3), 8, 2, (True, True), dtype)
        apart[1][0] = apart[1][0].contiguous()  # keys that lie in another way than the queries
        yield JOIN, apart
        for width, pairs, length in product((64, 100), (1, 2), (0, 3)):
            yield MODULATED_NORM, modulated_arguments(length, width, pairs, dtype)
        for length, (head_dim, _) in product((0, 3), sizes):
            yield MERGE, merge_arguments(length, head_dim, dtype)


def test_kernels_give_what_their_twins_give() -> None:
    tried = list(cases())
    for (fused, arguments), found in zip(tried, interpreted(tried), strict=True):
        pairs = zip(tree_leaves(found), tree_leaves(fused.plain(*arguments)), strict=True)
        for kernels, twins in pairs:
            assert_close(kernels, twins)
            assert fused is not PART or torch.equal(kernels, twins)


def test_another_number_of_parts_would_be_noticed() -> None:
    arguments = join_arguments((2, 3), 8, 2, (True, True), torch.float32)
    (found,) = interpreted([(JOIN, arguments)])
    assert not torch.equal(found, JOIN.plain(*arguments[:4], 5, arguments[5]))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_messages_hold_each_ranks_heads_of_both_streams(parts: int, dtype: torch.dtype) -> None:
    head_dim, lengths = 8, (3, 4)
    text, image = stream(lengths[0], head_dim, dtype, 1), stream(lengths[1], head_dim, dtype, 2)
    of_text, of_image = norms(head_dim, dtype, 3), norms(head_dim, dtype, 4)
    sent = join_heads(text, image, of_text, of_image, heads=HEADS, parts=parts, eps=1e-6)
    whole = []
    for i in range(3):
        x = [y[i].unflatten(-1, (HEADS, head_dim)) for y in (text, image)]
        if i < 2:
            x = [F.rms_norm(y, (head_dim,), w[i], 1e-6) for y, w in zip(x, (of_text, of_image), strict=True)]
        whole.append(torch.cat(x, dim=1))
    start = 0
    for first, last in head_ranges(HEADS, parts):
        size = sum(lengths) * ROWS * 3 * (last - first) * head_dim
        message = sent[start : start + size].view(sum(lengths), ROWS, 3, last - first, head_dim)
        for i in range(3):
            assert_close(message[:, :, i].transpose(0, 1), whole[i][:, :, first:last])
        start += size
    assert start == sent.numel()


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_heads_of_all_ranks_become_two_streams(parts: int, rows: int) -> None:
    head_dim, first = 8, 3
    whole = torch.randn(rows, 7, HEADS, head_dim)
    flat = torch.cat([whole[:, :, a:b].transpose(0, 1).flatten() for a, b in head_ranges(HEADS, parts)])
    for x, degree in ((flat, parts), (whole, 1)):
        one, two = part_heads(x, rows, first, HEADS, head_dim, degree)
        assert torch.equal(torch.cat([one, two], dim=1), whole.flatten(2)) and one.shape[1] == first


def test_a_norm_is_shifted_and_scaled_by_each_rows_own() -> None:
    x, (shift, other_shift), (scale, other_scale), eps = modulated_arguments(3, 16, 2, torch.float32)
    found = modulated_norm(x, eps, (shift, scale), (other_shift, other_scale))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    assert_close(found[0], normed * (1 + scale) + shift)
    assert_close(found[1], normed * (1 + other_scale) + other_shift)


@pytest.mark.parametrize(("heads", "parts"), [(38, 4), (5, 5), (24, 7), (8, 1)])
def test_heads_are_shared_out_as_tokens_are(heads: int, parts: int) -> None:
    from parallel_backend.distributed.collectives import split_range

    assert head_ranges(heads, parts) == [split_range(heads, parts, part) for part in range(parts)]
