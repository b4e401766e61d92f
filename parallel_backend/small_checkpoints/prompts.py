"""Conditioning of random numbers, for when there is no text encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.unet import micro_conditioning


def random_prompt(seed: int, tokens: int = 77, rows: int = 1) -> tuple[Tensor, Tensor]:
    """(context, pooled) in SD3's shapes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, 4096, generator=generator), torch.randn(rows, 2048, generator=generator)


def random_sdxl_prompt(
    seed: int, tokens: int = 77, rows: int = 1, *, side: int = 1024, context_width: int = 2048, pooled_width: int = 2816
) -> tuple[Tensor, Tensor]:
    """(context, pooled with the sizes of a square picture embedded): SDXL's shapes, or the refiner's by its widths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [float(size) for size in (side, side, 0, 0, side, side)][: (pooled_width - 1280) // 256]
    pooled = torch.randn(rows, 1280, generator=generator)
    return torch.randn(rows, tokens, context_width, generator=generator), micro_conditioning(pooled, sizes)
