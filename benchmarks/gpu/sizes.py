"""What is measured: models at their real sizes, or small ones that a CPU runs in a moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parallel_backend.bench.layouts import SD35_LARGE, SDXL
from parallel_backend.models.mmdit import MMDiTConfig
from parallel_backend.models.unet import UNetConfig
from parallel_backend.small_checkpoints.mmdit import small_config
from parallel_backend.small_checkpoints.unet import CONFIGS

from .options import Options

CELL = 8  # pixels


@dataclass(frozen=True)
class Sizes:
    """Sides are in pixels, `repeats` of the median that a figure is."""

    mmdit: MMDiTConfig
    unet: UNetConfig
    side: int
    text: int
    vae_side: int
    vae_width: int
    dtypes: tuple[torch.dtype, ...]
    warm_up: int
    repeats: int

    @property
    def cells(self) -> int:
        return self.side // CELL

    @property
    def tokens(self) -> int:
        """Of an evaluation of the MMDiT: image and text."""
        return (self.cells // self.mmdit.patch_size) ** 2 + self.text


REAL = Sizes(SD35_LARGE, SDXL, 1024, 154, 2048, 128, (torch.bfloat16, torch.float16), 2, 5)
TINY = Sizes(small_config("sd3.5-large", depth=2), CONFIGS["tiny"], 128, 10, 64, 32, (torch.float32,), 1, 2)


def sizes_of(options: Options) -> Sizes:
    return TINY if options.tiny else REAL


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
