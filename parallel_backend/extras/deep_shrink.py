"""A UNet whose inner blocks see a smaller picture than the outer ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..distributed.band_image import BandImage
from ..distributed.resize import METHODS
from ..distributed.sites import UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import Downscale
from .target import Target, check_known

# As ComfyUI's node has them.
LEAST_FACTOR, MOST_FACTOR = 0.1, 9.0


@dataclass(frozen=True, kw_only=True)
class SmallerWithin(Extra):
    """As asked."""

    asked: Downscale
    resizes = True
    name = "deep shrink"
    between_blocks = True

    @classmethod
    def read(cls, asked: Downscale, target: Target, range_of: dict[str, Any]) -> SmallerWithin:
        """Raises: InputError: a block or a method that there isn't, or sizes that the latent can't have there."""
        places = target.config.places
        check_known([asked.block], range(len(places)), "input block", target)
        check_methods(asked.method, asked.back)
        _check_sides(asked, target, places)
        return cls(asked=asked, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sites_of = sites.after_skip if self.asked.after_skip else sites.after_input
        sites_of[self.asked.block].append((self.asked.first, self._smaller))
        sites.before_output.append((self.asked.order, self._restored))
        sites.scales_residuals |= self.asked.scales_residuals

    def _smaller(self, image: BandImage) -> BandImage:
        return image.resized(*self.asked.sides(*image.sides), self.asked.method)

    def _restored(self, image: BandImage, skip: BandImage, number: int) -> tuple[BandImage, BandImage]:
        """As ComfyUI, by height alone."""
        if image.sides[0] == skip.sides[0]:
            return image, skip
        return image.resized_like(skip, self.asked.back), skip


def check_methods(*methods: str) -> None:
    """Raises: InputError: there is no such method of resizing."""
    for method in methods:
        if method not in METHODS:
            raise InputError(f"There is no method {method!r} of resizing.", f"Use one of {', '.join(METHODS)}.")


def _check_sides(asked: Downscale, target: Target, places: list[tuple[int, int]]) -> None:
    """Raises: InputError."""
    if not LEAST_FACTOR <= asked.factor <= MOST_FACTOR:
        raise InputError(
            f"Sides of a picture can't be divided by {asked.factor:g}.", f"Give {LEAST_FACTOR:g} to {MOST_FACTOR:g}."
        )
    level = places[asked.block][1]
    sides = -(-target.height // 2**level), -(-target.width // 2**level)
    smaller = asked.sides(*sides)
    # Where the blocks going up meet a skip connection that wasn't made smaller, at the same scale.
    meets = asked.after_skip or places[max(0, asked.block - 1)][1] == level
    told = f"Input block {asked.block} gives {sides[0]} x {sides[1]} values (height x width), by {asked.factor:g}"
    if 0 in smaller:
        raise InputError(f"{told} none at all.", "Give a smaller factor, or a larger latent.")
    if meets and smaller[0] == sides[0] and smaller[1] != sides[1]:
        raise InputError(
            f"{told} {smaller[0]} x {smaller[1]}: rounded, the height stays, and only heights are resized back.",
            "Give another factor.",
        )
    if asked.block == 0 and not asked.after_skip and smaller != sides:
        raise InputError("Made smaller at input block 0, the whole result would be.", "Give a later block.")
