"""Sides of what a UNet's blocks see, where extras resize it: walked before anything is computed, with images that have no values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.band import Cut
from ..distributed.band_image import BandImage
from ..distributed.mesh import MeshAxis
from ..distributed.sites import BlockName, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from .target import Target

_REMEDY = "Give nodes that resize what blocks see other blocks or factors, or a larger latent."


def check_inner_sides(extras: Sequence[Extra], target: Target) -> None:
    """Whichever of them act at once, blocks get what they can join, and extras the tokens that they are for.

    Raises: InputError: not so, at some sigma.
    """
    if not any(extra.resizes or extra.is_drawn for extra in extras):
        return
    for together in _together(extras):
        if any(extra.resizes or extra.is_drawn for extra in together):
            sides = _walked(together, target)
            for extra in together:
                extra.check_inside(sides)


def _together(extras: Sequence[Extra]) -> list[list[Extra]]:
    """Those that act at one sigma, for all sigmas."""
    edges = sorted({0.0, *(edge for extra in extras for edge in (extra.start, extra.end))})
    sigmas = [*edges[1:], *((below + above) / 2 for below, above in pairwise(edges))]
    numbers = {tuple(i for i, extra in enumerate(extras) if extra.is_at(sigma)) for sigma in sigmas}
    return [[extras[i] for i in those] for those in sorted(numbers)]


def _walked(extras: Sequence[Extra], target: Target) -> dict[BlockName, tuple[int, int]]:
    """Rows and columns at each block. Raises: InputError: blocks of two sizes meet."""
    sites, levels = UNetSites(), [level for _, level in target.config.places]
    for extra in extras:
        extra.on_unet(sites)
    image = _image(_cut(target.height, target.width), 0)
    found: dict[BlockName, tuple[int, int]] = {}
    skips, whole = [], image
    for number, level in enumerate(levels):
        if level == image.level:
            found["input", number] = image.sides
        elif (downsample := sites.downsample.get(number)) is not None:
            image = downsample(image, _convolved)
        else:
            image = _image(image.latent, level)
        skip, image = sites.after_block(number, image)
        skips.append(skip)
    found["middle", 0] = image.sides
    for number in range(len(levels)):
        skip = skips.pop()
        image, skip = sites.before_block(number, image, skip)
        _check_alike(image, skip, f"output block {number}")
        found["output", number] = skip.sides
        if skips and skips[-1].level != skip.level and (upsample := sites.upsample.get(number)) is not None:
            upsample(image, skips[-1], lambda upsampled: upsampled)
        image = skips[-1] if skips and skips[-1].level != skip.level else skip
    _check_alike(image, whole, "the end")
    return found


def _check_alike(image: BandImage, other: BandImage, where: str) -> None:
    if image.sides != other.sides:
        ours, theirs = (f"{height} x {width}" for height, width in (image.sides, other.sides))
        raise InputError(
            f"At {where} a picture of {ours} values (height x width) meets one of {theirs}: nothing resizes it back there.",
            _REMEDY,
        )


def _cut(height: int, width: int) -> Cut:
    if min(height, width) < 1:
        raise InputError(f"Blocks would see a picture of {height} x {width} values (height x width).", _REMEDY)
    return Cut(MeshAxis("band"), (height,), width)


def _image(latent: Cut, level: int) -> BandImage:
    return BandImage(torch.empty(1, 1, *latent.halved(level).sides, device="meta"), latent, level, _cut)


def _convolved(x_BCYX: Tensor, *, stride: int, dilation: int, columns: int) -> Tensor:
    kernel = torch.empty(1, 1, 3, 3, device="meta")
    return F.conv2d(x_BCYX, kernel, stride=stride, dilation=dilation, padding=(0, columns))
