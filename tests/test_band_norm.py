"""The bands' group norm as a GPU computes it, with real numbers: that of the whole image, in every precision and layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from parallel_backend.distributed.mesh import MeshAxis
from parallel_backend.distributed.patch_layers import Band, BandGroupNorm, _combined, moments

ROWS = [9, 4]


class TogetherNorm(BandGroupNorm):
    """One band of several whose statistics are all known."""

    every: Tensor

    def _whole(self, own_2BG: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        return _combined(self.every, rows)


def in_bands(norm: nn.GroupNorm, x: Tensor, method: str, layout: torch.memory_format) -> Tensor:
    parts = [part.contiguous(memory_format=layout) for part in x.split(ROWS, dim=2)]
    every = torch.stack([moments(part, norm.num_groups) for part in parts])
    done = []
    for rank, part in enumerate(parts):
        layer = TogetherNorm(norm, Band(MeshAxis("band", len(ROWS), rank), ROWS, x.shape[3]), "slot")
        layer.every = every
        done.append(getattr(layer, method)(part))
    return torch.cat(done, dim=2)


@pytest.mark.parametrize("mean", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bands_summed_up_give_the_norm_of_the_whole(
    dtype: torch.dtype, layout: torch.memory_format, mean: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 64, sum(ROWS), 10, generator=generator) * 2 + mean).to(dtype).contiguous(memory_format=layout)
    norm = nn.GroupNorm(32, 64, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.randn(64, generator=generator))
    norm.bias.copy_(torch.randn(64, generator=generator))
    norm.to(dtype)
    expected = norm.double()(x.double())
    norm.to(dtype)
    # Half precision: its rounding of the result, and half as much again. In fp32, what the mean's own rounding leaves.
    allowed = {torch.float32: 1e-6 * (1 + mean), torch.float16: 1.5 * 2**-11, torch.bfloat16: 1.5 * 2**-8}[dtype]
    for method in ("by_sums", "by_kernel"):
        out = in_bands(norm, x, method, layout)
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
        assert ((out - expected).abs() / (1 + expected.abs())).max() < allowed, method


def test_a_band_of_one_value_has_no_negative_variance() -> None:
    """What rounding leaves of its squares is below zero at times, and its root would be no number."""
    x = (
        torch.full((1, 32, 8, 8), 97.0, dtype=torch.bfloat16)
        * torch.linspace(0.5, 1.5, 32).view(1, -1, 1, 1).bfloat16()
    )
    mean, var = moments(x, 32)
    assert torch.allclose(mean, x[:, :, 0, 0].float()) and (var >= 0).all() and (var < 1e-2).all()
