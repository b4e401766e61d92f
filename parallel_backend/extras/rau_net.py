"""RAU-Net: a UNet whose inner blocks see a smaller picture, by what blocks give each other and by its own downsamplings.

Source: HiDiffusion (Zhang et al. 2023, arXiv 2311.17528), section 3.2, as comfyui_jankhidiffusion has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F

from ..distributed.band_image import BandImage
from ..distributed.sites import Convolve, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import POOLED, DownsampleByFour, Rescale, RescaleBack, UpsampleBy
from .deep_shrink import check_methods
from .target import Target, check_known

_NAME = "RAUNet"
# How far from its place a kernel's outer cell lies, and how many places are passed from one to the next.
_APART, _STEP = 2, 4


@dataclass(frozen=True, kw_only=True)
class RescaledBlocks(Extra):
    """As asked."""

    asked: Rescale
    resizes = True
    between_blocks = True
    name = _NAME

    @classmethod
    def read(cls, asked: Rescale, target: Target, range_of: dict[str, Any]) -> RescaledBlocks:
        """Raises: InputError: a block or a method that there isn't, or numbers that sides can't be divided by."""
        check_known(asked.blocks, range(len(target.config.places)), "input block", target)
        if asked.method != POOLED:
            check_methods(asked.method)
        if min(*asked.factors, asked.unit) <= 0:
            factors = " and ".join(f"{factor:g}" for factor in asked.factors)
            raise InputError(
                f"Sides of a picture can't be divided by {factors} to multiples of {asked.unit:g}.",
                "Give numbers above 0.",
            )
        return cls(asked=asked, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sites_of = sites.after_skip if self.asked.after_skip else sites.after_input
        for block in self.asked.blocks:
            sites_of[block].append((self.asked.first, self._rescaled))
        sites.scales_residuals |= self.asked.scales_residuals

    def _rescaled(self, image: BandImage) -> BandImage:
        asked = self.asked
        if asked.asked_sides(*image.sides) == image.sides:
            return image
        sides, scaled = asked.sides(*image.sides), times(image, asked.before)
        if asked.method == POOLED:
            cells = asked.cells(*image.sides)
            scaled = scaled.made(*sides, partial(F.avg_pool2d, kernel_size=cells, ceil_mode=asked.round_up))
        else:
            scaled = scaled.resized(*sides, asked.method)
        return times(scaled, asked.after)


@dataclass(frozen=True, kw_only=True)
class RescaledBack(Extra):
    """As asked."""

    asked: RescaleBack
    between_blocks = True
    name = _NAME

    @classmethod
    def read(cls, asked: RescaleBack, target: Target, range_of: dict[str, Any]) -> RescaledBack:
        """Raises: InputError: a block or a method that there isn't."""
        check_known(asked.blocks, range(len(target.config.places)), "output block", target)
        check_methods(asked.method)
        return cls(asked=asked, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sites.before_output.append((self.asked.order, self._restored))

    def _restored(self, image: BandImage, skip: BandImage, number: int) -> tuple[BandImage, BandImage]:
        if number not in self.asked.blocks or image.sides == skip.sides:
            return image, skip
        return times(times(image, self.asked.before).resized_like(skip, self.asked.method), self.asked.after), skip


@dataclass(frozen=True, kw_only=True)
class WideDownsample(Extra):
    """Each rank computes its own rows of the result. Comm: all bands of what comes to it, to every rank."""

    asked: DownsampleByFour
    resizes = True
    between_blocks = True
    name = _NAME

    @classmethod
    def read(cls, asked: DownsampleByFour, target: Target, range_of: dict[str, Any]) -> WideDownsample:
        """Raises: InputError: a block that is no downsampling."""
        levels = [level for _, level in target.config.places]
        check_known([asked.block], _changes(levels), "downsampling input block", target)
        return cls(asked=asked, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sites.downsample[self.asked.block] = self._downsampled
        sites.scales_residuals |= self.asked.scales_residuals

    def _downsampled(self, image: BandImage, convolve: Convolve) -> BandImage:
        level, (height, width) = image.level + 1, self.asked.sides(*image.sides)
        latent = image.cutter(height << level, width << level)
        start, stop = latent.halved(level).own_rows
        whole = F.pad(times(image, self.asked.before).whole(), (0, 0, _APART, _APART))
        seen = whole[:, :, start * _STEP : (stop - 1) * _STEP + 2 * _APART + 1]
        out = convolve(seen, stride=_STEP, dilation=_APART, columns=_APART)
        return times(BandImage(out, latent, level, image.cutter), self.asked.after)


@dataclass(frozen=True, kw_only=True)
class OtherUpsample(Extra):
    """As asked."""

    asked: UpsampleBy
    between_blocks = True
    name = _NAME

    @classmethod
    def read(cls, asked: UpsampleBy, target: Target, range_of: dict[str, Any]) -> OtherUpsample:
        """Raises: InputError: a block that does not end in an upsampling, or a method that there isn't."""
        levels = [level for _, level in target.config.places][::-1]
        ends = [number - 1 for number in _changes(levels)]
        check_known([asked.block], ends, "upsampling output block", target)
        check_methods(asked.method, *([] if asked.halfway is None else [asked.halfway]))
        return cls(asked=asked, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sites.upsample[self.asked.block] = self._upsampled

    def _upsampled(self, image: BandImage, skip: BandImage, convolve: Callable[[BandImage], BandImage]) -> BandImage:
        asked, (height, width) = self.asked, skip.sides
        image = times(image, asked.before)
        if asked.halfway is not None:
            image = image.resized(height // 2, width // 2, asked.halfway)
        return times(convolve(image.resized_like(skip, asked.method)), asked.after)


def times(image: BandImage, gain: float) -> BandImage:
    """Its values times that."""
    return image if gain == 1 else image.with_band(image.x * gain)


def _changes(levels: list[int]) -> list[int]:
    """Numbers of the blocks whose level is another than that of the one before."""
    return [number for number in range(1, len(levels)) if levels[number] != levels[number - 1]]
