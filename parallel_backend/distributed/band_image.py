"""What the blocks of a UNet hand on: this rank's band of an image, whose size extras may change between blocks.

Shapes: B batch, C channels, Y rows of the band, X columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from .band import Cut
from .collectives import all_gather
from .resize import resized

# Height and width of a latent -> how the ranks share it out.
Cutter = Callable[[int, int], Cut]


@dataclass(frozen=True)
class BandImage:
    """One of them.

    Args:
        x: (B, C, Y, X).
        latent: how the latent is cut from which an image of this size comes by halvings.
        level: how many halvings these were.
        cutter: cuts latents of other sizes.
    """

    x: Tensor
    latent: Cut
    level: int
    cutter: Cutter

    @property
    def cut(self) -> Cut:
        """The image's own."""
        return self.latent.halved(self.level)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the whole image."""
        return self.cut.sides

    def with_band(self, x_BCYX: Tensor) -> BandImage:
        """Another tensor of the same band."""
        return replace(self, x=x_BCYX)

    def whole(self) -> Tensor:
        """(B, C, height, width). Comm: all bands to every rank, where they are of several."""
        return all_gather(self.x, 2, self.cut.rows, self.cut.axis)

    def resized(self, height: int, width: int, method: str) -> BandImage:
        """The whole image made larger or smaller, and cut anew in bands of whole units. Comm: as `whole`."""
        return self.made(height, width, partial(resized, height=height, width=width, method=method))

    def made(self, height: int, width: int, make: Callable[[Tensor], Tensor]) -> BandImage:
        """As `resized`, by `make`, which gives the whole image these sides."""
        return self._as(self.cutter(height << self.level, width << self.level), self.level, make)

    def resized_like(self, other: BandImage, method: str) -> BandImage:
        """In the size and the bands of `other`, which may be of another level. Comm: as `resized`."""
        height, width = other.sides
        return self._as(other.latent, other.level, partial(resized, height=height, width=width, method=method))

    def cut_as(self, latent: Cut) -> BandImage:
        """In the bands of a latent that has the same sides at this level. Comm: as `resized`, where these are others."""
        assert self.sides == latent.halved(self.level).sides
        return replace(self, latent=latent) if self.cut == latent.halved(self.level) else self._as(latent, self.level)

    def _as(self, latent: Cut, level: int, make: Callable[[Tensor], Tensor] = lambda whole: whole) -> BandImage:
        whole, (start, stop) = make(self.whole()), latent.halved(level).own_rows
        return BandImage(whole[:, :, start:stop], latent, level, self.cutter)
