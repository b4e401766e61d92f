"""The bands' group norm with real numbers, as CPUs and as GPUs compute it: that of the whole image, in every precision and layout."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_backend.distributed.band import Band
from parallel_backend.distributed.band_norm import BandGroupNorm
from parallel_backend.distributed.collectives import Handle
from parallel_backend.distributed.mesh import MeshAxis
from parallel_backend.fused.group_norm import MOMENTS, combined, part_sizes, shares_of

ROWS = [9, 4, 2]


@dataclass
class Together(Band):
    """A band of several, one after the other in this process: the first time it hears zeros, then what all have said."""

    said: list[Tensor] = field(default_factory=list)

    def tell(self, slot: str, message_N: Tensor) -> Handle:
        if len(self.said) < len(ROWS):
            self.said.append(message_N.clone())
            return Handle(torch.zeros(len(ROWS), len(message_N), dtype=message_N.dtype))
        return Handle(torch.stack(self.said))


def in_bands(
    norm: nn.GroupNorm, x: Tensor, method: str, layout: torch.memory_format, activated: bool, halo: tuple[int, int]
) -> list[Tensor]:
    parts, said, done = [part.contiguous(memory_format=layout) for part in x.split(ROWS, dim=2)], [], []
    for _ in range(2):
        done = []
        for rank, part in enumerate(parts):
            band = Together(MeshAxis("band", len(ROWS), rank), ROWS, x.shape[3], said=said)
            layer = BandGroupNorm(norm, band, "slot", activated=activated, halo=halo)
            done.append(getattr(layer, method)(part))
    return done


@pytest.mark.parametrize("mean", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bands_together_give_the_norm_of_the_whole(
    dtype: torch.dtype, layout: torch.memory_format, mean: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 64, sum(ROWS), 10, generator=generator) * 2 + mean).to(dtype).contiguous(memory_format=layout)
    norm = nn.GroupNorm(32, 64, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.randn(64, generator=generator))
    norm.bias.copy_(torch.randn(64, generator=generator))
    norm.to(dtype)
    whole = norm.double()(x.double())
    norm.to(dtype)
    # Half precision: its rounding of the result, and half as much again. In fp32, what the mean's own rounding leaves.
    allowed = {torch.float32: 2e-6 * (1 + mean), torch.float16: 1.5 * 2**-11, torch.bfloat16: 1.5 * 2**-8}[dtype]
    for method in ("by_kernels", "on_cpu"):
        for activated, (above, below) in ((False, (0, 0)), (True, (1, 1)), (True, (2, 0))):
            expected = F.pad(F.silu(whole) if activated else whole, (0, 0, above, below))
            start = 0
            for rows, out in zip(ROWS, in_bands(norm, x, method, layout, activated, (above, below)), strict=True):
                own = expected[:, :, start : start + above + rows + below]
                # SiLU comes after a rounding more, where plain operations compute.
                most = allowed * (1 + activated)
                assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
                assert ((out - own).abs() / (1 + own.abs())).max() < most, (method, activated)
                start += rows


def test_a_band_of_one_value_has_no_negative_variance() -> None:
    """What rounding leaves of its squares is below zero at times, and its root would be no number."""
    x = (
        torch.full((1, 32, 8, 8), 97.0, dtype=torch.bfloat16)
        * torch.linspace(0.5, 1.5, 32).view(1, -1, 1, 1).bfloat16()
    )
    mean, var = combined(MOMENTS(x, 32), shares_of(part_sizes(64), x.device))
    assert torch.allclose(mean, x[:, :, 0, 0].float()) and (var >= 0).all() and (var < 1e-2).all()
