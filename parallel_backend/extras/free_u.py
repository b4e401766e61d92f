"""Between blocks of a UNet, the image is weighed anew: more of its own channels, less of a skip connection's coarse shapes.

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
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import FreeU
from .target import Target

# As the node with the most has them; one picture's message has 2 numbers a channel for each of 4 * cycles ** 2 frequencies.
MOST_CYCLES = 10


@dataclass(frozen=True, kw_only=True)
class WeighedSkips(Extra):
    """Fields as those of `FreeU`, but for these.

    Args:
        factors: (channels, how many of these are multiplied, of the image, of the skip connection).
        site: `FreeU.at`. inputs: input blocks that the model has.
    """

    factors: tuple[tuple[int, int, float, float], ...]
    by_structure: bool
    order: int
    site: str
    cycles: int
    inputs: int
    name = "FreeU"
    between_blocks = True

    @classmethod
    def read(cls, asked: FreeU, target: Target, range_of: dict[str, Any]) -> WeighedSkips:
        """Raises: InputError: numbers of channels or frequencies that there can't be."""
        if not 1 <= asked.cycles <= MOST_CYCLES:
            raise InputError(f"FreeU came with {asked.cycles} cycles.", f"Give 1 to {MOST_CYCLES}.")
        widths = [channels for channels, *_ in asked.factors]
        scaled = [channels // 2 for channels in widths] if asked.scaled is None else asked.scaled
        if len(scaled) != len(widths) or any(not 0 <= n <= width for n, width in zip(scaled, widths, strict=False)):
            raise InputError(
                f"FreeU is to multiply {scaled} channels of {widths}.", "Give as many numbers, none above its width."
            )
        return cls(
            factors=tuple((width, n, b, s) for (width, b, s), n in zip(asked.factors, scaled, strict=True)),
            by_structure=asked.by_structure,
            order=asked.order,
            site=asked.at,
            cycles=asked.cycles,
            inputs=len(target.config.places),
            **range_of,
        )

    def on_unet(self, sites: UNetSites) -> None:
        if self.site == "output":
            sites.before_output.append((self.order, self._joined))
        elif self.site == "middle":
            sites.after_middle.append(self._weighed)
        else:
            for number in range(self.inputs):
                sites.after_input[number].append((self.order, self._weighed))

    def _weighed(self, image: BandImage) -> BandImage:
        """Comm: by structure two numbers a row to every rank."""
        found = self._factors_of(image)
        if found is None:
            return image
        scaled, of_image, _ = found
        factor = _by_structure(image, of_image) if self.by_structure else of_image
        x = image.x.clone()
        x[:, :scaled] *= factor
        return image.with_band(x)

    def _joined(self, image: BandImage, skip: BandImage, number: int) -> tuple[BandImage, BandImage]:
        """Comm: as `_weighed`, and as `low_frequencies_scaled`."""
        found = self._factors_of(image)
        if found is None:
            return image, skip
        weighed = self._weighed(image)
        # Without a middle block they are one tensor, which ComfyUI changes in place.
        return weighed, low_frequencies_scaled(weighed if skip is image else skip, found[2], self.cycles)

    def _factors_of(self, image: BandImage) -> tuple[int, float, float] | None:
        for channels, *found in self.factors:
            if channels == image.x.shape[1]:
                scaled, of_image, of_skip = found
                return int(scaled), of_image, of_skip
        return None


def _by_structure(image: BandImage, factor: float) -> Tensor:
    """(B, 1, Y, X): 1 where the mean of all channels is the least of the picture, `factor` where it is the greatest."""
    mean = image.x.mean(1, keepdim=True)
    own_2B = torch.stack([mean.amax((1, 2, 3)), -mean.amin((1, 2, 3))])
    most, least = start_all_gather(own_2B[None], image.cut.axis).wait().amax(0).view(2, -1, 1, 1, 1)
    return (factor - 1) * ((mean + least) / (most + least)) + 1


def low_frequencies_scaled(image: BandImage, factor: float, cycles: int = 1) -> BandImage:
    """The whole image's lowest frequencies are multiplied by `factor`: -cycles to cycles - 1 in each direction.

    The opposite of -cycles stays, and of the result the real part is taken, as ComfyUI does.
    Comm: two numbers for each channel and frequency to every rank.
    """
    x, (height, width) = image.x.float(), image.sides
    waves_KYX = _waves(image, cycles)
    own_BCK = torch.einsum("bcyx,kyx->bck", x, waves_KYX)
    whole_BCK = start_all_gather(own_BCK[None], image.cut.axis).wait().sum(0)
    part = torch.einsum("bck,kyx->bcyx", whole_BCK, waves_KYX)
    return image.with_band(torch.add(x, part, alpha=(factor - 1) / (height * width)).to(image.x.dtype))


def _waves(image: BandImage, cycles: int) -> Tensor:
    """At this band's cells, the cosines of the frequencies and their sines."""
    (height, width), (start, stop) = image.sides, image.cut.own_rows
    v, u = (_lowest(side, cycles) for side in (height, width))
    ranges = (v, u, range(start, stop), range(width))
    v_K, u_K, y_Y, x_X = (torch.arange(r.start, r.stop, dtype=torch.float32, device=image.x.device) for r in ranges)
    down_KY, across_KX = 2 * pi / height * v_K[:, None] * y_Y, 2 * pi / width * u_K[:, None] * x_X
    angles = (down_KY[:, None, :, None] + across_KX[None, :, None, :]).flatten(0, 1)
    return torch.cat([angles.cos(), angles.sin()])


def _lowest(side: int, cycles: int) -> range:
    """Frequencies along a side: where that has fewer, those that Python's slices leave of them."""
    middle = side // 2
    return range(-middle, side - middle)[middle - cycles : middle + cycles]
