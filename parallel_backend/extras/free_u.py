"""What output blocks of a UNet join is weighed anew: more of the image's own channels, less of a skip connection's coarse shapes.

Source: FreeU (Si et al. 2023, arXiv 2309.11497), equations 3 to 5.
Shapes: B rows, C channels, Y rows of this rank's band, X columns, K waves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor

from ..distributed.band_image import BandImage
from ..distributed.collectives import start_all_gather
from ..distributed.sites import UNetSites
from ..models.extra import Extra
from ..rpc.extras import FreeU
from .target import Target


@dataclass(frozen=True, kw_only=True)
class WeighedSkips(Extra):
    """Fields as those of `FreeU`."""

    factors: tuple[tuple[int, float, float], ...]
    by_structure: bool
    order: int
    name = "FreeU"
    between_blocks = True

    @classmethod
    def read(cls, asked: FreeU, target: Target, range_of: dict[str, Any]) -> WeighedSkips:
        return cls(factors=tuple(asked.factors), by_structure=asked.by_structure, order=asked.order, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sites.before_output.append((self.order, self._weighed))

    def _weighed(self, image: BandImage, skip: BandImage, number: int) -> tuple[BandImage, BandImage]:
        """Comm: 7 numbers for each channel of the skip connection to every rank; by structure, two more a row."""
        found = [(of_image, of_skip) for channels, of_image, of_skip in self.factors if channels == image.x.shape[1]]
        if not found:
            return image, skip
        of_image, of_skip = found[0]
        factor = _by_structure(image, of_image) if self.by_structure else of_image
        x = image.x.clone()
        x[:, : x.shape[1] // 2] *= factor
        scaled = image.with_band(x)
        # Without a middle block they are one tensor, which ComfyUI changes in place.
        return scaled, low_frequencies_scaled(scaled if skip is image else skip, of_skip)


def _by_structure(image: BandImage, factor: float) -> Tensor:
    """(B, 1, Y, X): 1 where the mean of all channels is the least of the picture, `factor` where it is the greatest."""
    mean = image.x.mean(1, keepdim=True)
    own_2B = torch.stack([mean.amax((1, 2, 3)), -mean.amin((1, 2, 3))])
    most, least = start_all_gather(own_2B[None], image.cut.axis).wait().amax(0).view(2, -1, 1, 1, 1)
    return (factor - 1) * ((mean + least) / (most + least)) + 1


def low_frequencies_scaled(image: BandImage, factor: float) -> BandImage:
    """The whole image's four lowest frequencies are multiplied by `factor`: 0 and -1 cycles in each direction.

    Their opposites, +1 cycle, stay, and of the result the real part is taken, as ComfyUI does.
    Comm: 7 numbers for each channel to every rank.
    """
    x, (height, width) = image.x.float(), image.sides
    waves_KYX = _waves(image)
    own_BCK = torch.einsum("bcyx,kyx->bck", x, waves_KYX)
    whole_BCK = start_all_gather(own_BCK[None], image.cut.axis).wait().sum(0)
    part = torch.einsum("bck,kyx->bcyx", whole_BCK, waves_KYX)
    return image.with_band(torch.add(x, part, alpha=(factor - 1) / (height * width)).to(image.x.dtype))


def _waves(image: BandImage) -> Tensor:
    """At this band's cells: the cosines of the four frequencies, and the sines of those that have one.

    An image that is one cell high or wide has no other frequency than 0 there.
    """
    (height, width), (start, stop) = image.sides, image.cut.own_rows
    y, x = (torch.arange(*ends, dtype=torch.float32, device=image.x.device) for ends in ((start, stop), (0, width)))
    y, x = 2 * pi / height * y[:, None], 2 * pi / width * x
    angles = torch.stack([v * y + u * x for v in (0, -1)[:height] for u in (0, -1)[:width]])
    return torch.cat([angles.cos(), angles[1:].sin()])
