"""What a UNet of the tests is given."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_backend.models.unet import UNetConfig
from parallel_backend.small_checkpoints.prompts import random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS


def unet_prompt(config: UNetConfig, seed: int, tokens: int = 77, rows: int = 1) -> tuple[Tensor, Tensor]:
    widths = {"context_width": config.context_width, "pooled_width": config.pooled_width}
    return random_sdxl_prompt(seed, tokens, rows, **widths)


def inputs(name: str, size: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, columns = size
    generator = torch.Generator().manual_seed(seed)
    config = CONFIGS[name]
    x = torch.randn(batch, config.channels + config.extra_channels, rows, columns, generator=generator)
    timesteps = torch.linspace(900, 20, batch)
    return x, timesteps, *unet_prompt(config, seed + 1, 77, batch)
