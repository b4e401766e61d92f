"""The published models' true sizes, by the name of their layout."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from ..models.mmdit import MMDiTConfig
from ..models.unet import UNetConfig

Config: TypeAlias = MMDiTConfig | UNetConfig

SD35_LARGE = MMDiTConfig(
    family="sd3.5-large",
    depth=38,
    heads=38,
    dual_blocks=(),
    qk_norm=True,
    channels=16,
    patch_size=2,
    pos_embed_size=192,
    context_width=4096,
    pooled_width=2048,
    mlp_width=9728,
)
SD35_MEDIUM = replace(
    SD35_LARGE,
    family="sd3.5-medium",
    depth=24,
    heads=24,
    dual_blocks=tuple(range(13)),
    pos_embed_size=384,
    mlp_width=6144,
)
SDXL = UNetConfig(
    family="sdxl",
    channels=4,
    block_channels=(320, 640, 1280),
    layers_per_block=2,
    down_depths=((0, 0), (2, 2), (10, 10)),
    up_depths=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    mid_depth=10,
    context_width=2048,
    pooled_width=2816,
)
LAYOUTS: dict[str, Config] = {config.family: config for config in (SD35_LARGE, SD35_MEDIUM, SDXL)}
