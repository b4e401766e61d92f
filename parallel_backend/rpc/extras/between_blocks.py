"""Extras of requests that act on what a UNet's blocks give each other."""

from __future__ import annotations

from typing import Literal, TypeAlias

from .spec import ExtraSpec

# A method of `Rescale` alone.
POOLED = "avg_pool2d"


# Where FreeU acts on a UNet's image: on what input blocks give, on what the middle block gives, on what output blocks join.
FreeUSite: TypeAlias = Literal["input", "middle", "output"]


class FreeU(ExtraSpec, frozen=True):
    """Between blocks of a UNet, some of the image's channels are multiplied, and the lowest frequencies of skip connections.

    Source: FreeU (Si et al. 2023, arXiv 2309.11497), equations 3 to 5.

    Args:
        factors: by channels of the image where they act: (channels, of the image, of the skip connection).
        by_structure: the image's factor differs by cell, as the mean of its channels does there: the paper's second version.
        order: among what acts before output blocks.
        scaled: how many of the image's channels, the first ones, are multiplied, for each of `factors`; None: half of them.
        at: where; only output blocks join skip connections.
        cycles: frequencies of -cycles to cycles - 1 in each direction are the lowest ones.
    """

    factors: list[tuple[int, float, float]]
    by_structure: bool
    order: int = 0
    scaled: list[int] | None = None
    at: FreeUSite = "output"
    cycles: int = 1


class Downscale(ExtraSpec, frozen=True):
    """What an input block of a UNet gives is made smaller, and large again where a skip connection is.

    Source: Kohya's deep shrink, as ComfyUI's PatchModelAddDownscale has it.

    Args:
        factor: both sides are divided by it, and rounded.
        after_skip: the skip connection stays as large as it was.
        method, back: of resizing, and of resizing back: see `distributed/resize.py`.
        first: among what acts after input blocks. order: of the resizing back, as FreeU's.
        scales_residuals: a ControlNet's are added in the size of the picture within, bilinear; else not at all where sizes differ.
    """

    block: int
    factor: float
    after_skip: bool
    method: str
    back: str
    first: int = 0
    order: int = 0
    scales_residuals: bool = False

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """What a picture's sides become."""
        return round(height * (1.0 / self.factor)), round(width * (1.0 / self.factor))


class Rescale(ExtraSpec, frozen=True):
    """What input blocks of a UNet give is made smaller by whole multiples of some cells.

    Source: HiDiffusion (Zhang et al. 2023, arXiv 2311.17528), RAU-Net, as comfyui_jankhidiffusion has it.

    Args:
        factors: by which height and width are divided; below 1 they grow.
        unit: sides become multiples of it, or stay what they are.
        after_skip, first, scales_residuals: as `Downscale`'s.
        method: as `Downscale`'s; or "avg_pool2d", means of whole cells, so that sides come near to what is asked.
        round_up: whether of those cells a last part makes one, too.
        before, after: what values are multiplied by.
    """

    blocks: tuple[int, ...]
    factors: tuple[float, float]
    unit: float
    after_skip: bool
    method: str
    round_up: bool = True
    before: float = 1.0
    after: float = 1.0
    first: int = 0
    scales_residuals: bool = False

    def asked_sides(self, height: int, width: int) -> tuple[int, int]:
        """Those that are aimed at."""
        found = []
        for side, factor in zip((height, width), self.factors, strict=True):
            aimed = int(max(self.unit, ((side / self.unit) // factor) * self.unit))
            found.append(min(side, aimed) if factor >= 1 else max(side, aimed))
        return found[0], found[1]

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the cells whose means "avg_pool2d" takes."""
        rows, columns = self.asked_sides(height, width)
        return max(1, height // rows), max(1, width // columns)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """As `Downscale.sides`."""
        asked = self.asked_sides(height, width)
        if self.method != POOLED or asked == (height, width):
            return asked
        rows, columns = (
            -(-side // cell) if self.round_up else side // cell
            for side, cell in zip((height, width), self.cells(height, width), strict=True)
        )
        return rows, columns


class RescaleBack(ExtraSpec, frozen=True):
    """Before output blocks of a UNet, an image of another size than its skip connection is brought to that one's.

    Source, before, after: as `Rescale`'s. order: as FreeU's.
    """

    blocks: tuple[int, ...]
    method: str
    before: float = 1.0
    after: float = 1.0
    order: int = 0


class DownsampleByFour(ExtraSpec, frozen=True):
    """A downsampling of a UNet gives a quarter of both sides in place of half: its kernel's cells and steps are twice as far apart.

    Source, before, after, scales_residuals: as `Rescale`'s.

    Args:
        block: the input block that it is.
    """

    block: int
    before: float = 1.0
    after: float = 1.0
    scales_residuals: bool = False

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """As `Downscale.sides`."""
        return -(-height // 4), -(-width // 4)


class UpsampleBy(ExtraSpec, frozen=True):
    """An upsampling of a UNet, before its convolution, by another method than of nearest cells.

    Source, before, after: as `Rescale`'s.

    Args:
        block: the output block that ends in it.
        halfway: the method by which it first comes to half of the size; None: by one alone.
    """

    block: int
    method: str
    halfway: str | None = None
    before: float = 1.0
    after: float = 1.0
