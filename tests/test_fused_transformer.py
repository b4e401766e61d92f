"""The transformers' fused kernels give what their twins give, in Triton's interpreter; twins give what plain words say."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted
from torch import Tensor

from parallel_backend.fused import joint_heads, merged_attention, modulated_norm
from parallel_backend.fused.joint_heads import head_ranges, join_heads, part_heads

ROOT = Path(__file__).parents[1]
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


MERGES = merged_attention._launch, merged_attention._plain


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.numel():
        error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        assert error <= TOLERANCES[wanted.dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_without_a_number_of_its_own_has_that_of_torch(dtype: torch.dtype) -> None:
    """Of fp32, in which it is computed: half precision's would halve queries as small as these."""
    qkv = [0.02 * x for x in stream(6, 64, dtype, 1)]
    none = [x[:, :0] for x in qkv]
    weights, head_dim = norms(64, dtype, 3), 64
    arguments = [qkv[0], [*qkv[1:], *none], [*weights, None, *weights, None], HEADS, 1, None]
    for sent in (joint_heads.JOIN.plain(*arguments), *interpreted([(joint_heads.JOIN, arguments)])):
        found_LB3NH = sent.view(6, ROWS, 3, HEADS, head_dim)
        for part, weight in enumerate(weights):
            x_LBNH = qkv[part].unflatten(-1, (HEADS, head_dim)).transpose(0, 1)
            assert_close(found_LB3NH[:, :, part], F.rms_norm(x_LBNH, (head_dim,), weight))


def beside_twins() -> None:
    """Every kernel beside its twin. In a process of its own: Triton is told to interpret when it is imported."""
    tokens, sizes = [(0, 3), (2, 3), (1, 0)], [(8, 1), (8, 2), (12, 3), (64, 5)]
    for dtype in TOLERANCES:
        for (head_dim, parts), lengths, normed in product(sizes, tokens, [(True, True), (False, True), (False, False)]):
            given = join_arguments(lengths, head_dim, parts, normed, dtype)
            assert_close(joint_heads._join_launch(*given), joint_heads._join_plain(*given))
            flat = torch.randn(ROWS * sum(lengths) * HEADS * head_dim).to(dtype)
            strided = torch.randn(ROWS, HEADS, sum(lengths), head_dim).to(dtype).transpose(1, 2)
            for x, degree in ((flat, parts), (strided, 1)):
                shape = ROWS, lengths[0], HEADS, head_dim, degree
                found, wanted = joint_heads._part_launch(x, *shape), joint_heads._part_plain(x, *shape)
                assert all(map(torch.equal, found, wanted))
        apart = join_arguments((2, 3), 8, 2, (True, True), dtype)
        apart[1][0] = apart[1][0].contiguous()  # keys that lie in another way than the queries
        assert_close(joint_heads._join_launch(*apart), joint_heads._join_plain(*apart))
        for width, pairs, length in product((64, 100), (1, 2), (0, 3)):
            given = modulated_arguments(length, width, pairs, dtype)
            for found, wanted in zip(modulated_norm._launch(*given), modulated_norm._plain(*given), strict=True):
                assert_close(found, wanted)
    for dtype, tokens_, (head_dim, _) in product(TOLERANCES, (0, 3), sizes):
        for found, wanted in zip(*(c(*merge_arguments(tokens_, head_dim, dtype)) for c in MERGES), strict=True):
            assert_close(found, wanted)
    wrong = join_arguments((2, 3), 8, 2, (True, True), torch.float32)
    other = [*wrong[:4], 5, wrong[5]]
    assert not torch.equal(joint_heads._join_launch(*wrong), joint_heads._join_plain(*other)), "this would be noticed"


def test_kernels_give_what_their_twins_give() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = "import test_fused_transformer; test_fused_transformer.beside_twins()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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
    found = modulated_norm.modulated_norm(x, eps, (shift, scale), (other_shift, other_scale))
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    assert_close(found[0], normed * (1 + scale) + shift)
    assert_close(found[1], normed * (1 + other_scale) + other_shift)


@pytest.mark.parametrize(("heads", "parts"), [(38, 4), (5, 5), (24, 7), (8, 1)])
def test_heads_are_shared_out_as_tokens_are(heads: int, parts: int) -> None:
    from parallel_backend.distributed.collectives import split_range

    assert head_ranges(heads, parts) == [split_range(heads, parts, part) for part in range(parts)]
