"""The kernels of bands: Triton's own interpreter runs them here, and they give what their plain twins give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from interpreted import interpreted
from torch import Tensor

from parallel_backend.fused.gated_gelu import GATED_GELU
from parallel_backend.fused.group_norm import MESSAGE, MOMENTS, NORM, message_size, part_sizes, shares_of
from parallel_backend.fused.operation import Fused

CPU = torch.device("cpu")
# Batch, channels, rows, columns: sizes that fill blocks and sizes that don't; fewer pixels than parts.
SIZES = [(2, 64, 5, 7), (1, 96, 4, 35), (1, 160, 1, 3)]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def image(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def moments(seed: int, parts: int, rows: int, groups: int = 32) -> Tensor:
    x = torch.randn(parts, 2, rows, groups, generator=torch.Generator().manual_seed(seed))
    return torch.stack([x[:, 0], x[:, 1].abs() + 0.5], dim=1)


def cases_of(size: tuple[int, int, int, int], dtype: torch.dtype) -> Iterator[tuple[Fused, list[Any]]]:
    """Every kernel on an image of that size."""
    x, (B, C, Y, X) = image(*size, dtype=dtype), size
    parts, shares = moments(1, 8, B), shares_of(part_sizes(Y * X), CPU)
    yield MOMENTS, [x, 32]
    rows = 1 if Y == 1 else 2
    for above, below in ((1, 1), (rows, 0), (0, 0)):
        message = x.new_zeros(message_size(x, 32, above, below))
        yield MESSAGE, [parts, shares, x, above, below, message]
    every, bands = moments(2, 3, B), shares_of((Y, Y + 1, 2), CPU)
    weight, bias = (image(1, C, 1, 1, dtype=dtype, seed=seed).flatten() for seed in (3, 4))
    top, bottom = (image(B, C, 1, X, dtype=dtype, seed=seed).permute(0, 2, 3, 1) for seed in (5, 6))
    fallen = every + torch.tensor([0.0, 50.0]).view(2, 1, 1) * torch.tensor([0, 1, 0]).view(3, 1, 1, 1)
    for told, fresh, edges in (
        (every, None, (1, 1, top, bottom)),
        (every, every[1] + 0.25, (1, 1, None, bottom)),
        (fallen, every[1], (0, 1, None, None)),  # whose variance as it has moved is negative
    ):
        yield NORM, [x, told, bands, fresh, 1, weight, bias, 1e-5, edges[0] == 1, *edges]
    yield NORM, [x, every, bands, None, 0, None, None, 1e-6, False, 0, 0, None, None]
    yield GATED_GELU, [x.permute(0, 2, 3, 1).flatten(0, 2).contiguous()]


def test_the_kernels_give_what_their_twins_give() -> None:
    """All in one process: Triton is told to interpret before it is imported. Which pixels a block has is alike in all precisions."""
    sizes = {torch.float32: SIZES, torch.float16: SIZES[1:2], torch.bfloat16: SIZES[2:]}
    tried = [(dtype, *case) for dtype in sizes for size in sizes[dtype] for case in cases_of(size, dtype)]
    by_kernel = interpreted([(fused, arguments) for _, fused, arguments in tried])
    for (dtype, fused, arguments), found in zip(tried, by_kernel, strict=True):
        expected = fused.plain(*arguments)
        expected = arguments[-1] if expected is None else expected
        if fused is MESSAGE:  # whose numbers are fp32 whatever the rows are
            numbers = arguments[0][0].numel() * 4 // dtype.itemsize
            assert torch.equal(found[numbers:], expected[numbers:])
            found, expected = (message[:numbers].view(torch.float32) for message in (found, expected))
        assert found.shape == expected.shape and found.dtype == expected.dtype
        allowed = 1e-5 if found.dtype == torch.float32 else TOLERANCES[dtype]
        error = ((found.float() - expected.float()).abs() / (1 + expected.float().abs())).max()
        assert error < allowed, (fused.name, [a if not isinstance(a, Tensor) else a.shape for a in arguments])


def test_moments_are_those_of_the_values_with_a_mean_far_from_zero() -> None:
    x = image(2, 64, 9, 10, dtype=torch.float32) + 1000
    ((found,),) = [interpreted([(MOMENTS, [x, 32])])]
    for part, values in zip(found, x.double().flatten(2).split(part_sizes(90), dim=2), strict=True):
        grouped = values.unflatten(1, (32, -1)).flatten(2)
        assert (part[0] - grouped.mean(2)).abs().max() < 1e-3
        assert (part[1] - grouped.var(2, unbiased=False)).abs().max() < 1e-2
