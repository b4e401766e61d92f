"""What a picture shows, told by plain image checks: are the named shapes there, in their colours, at their places?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from .drawing import shade, shape_mask
from .scenes import COLORS, SHAPES, Scene

TEMPLATE = 32
# Smaller pieces, as a share of the picture, are taken for blur.
LEAST_AREA = 0.006
# How far from its middle a thing may be and still count as there, as a share of the side.
MARGIN = 0.12

Labels = np.ndarray


@dataclass(frozen=True)
class Piece:
    """A connected region of one colour; x and y are its centre, as fractions of width and height."""

    color: str
    shape: str
    x: float
    y: float


def shows(picture: Image.Image, scene: Scene) -> bool:
    """Whether the picture has the scene's background and all its things, and no other large piece of their colours."""
    labels = label_colors(picture)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    if list(COLORS)[np.bincount(border, minlength=len(COLORS)).argmax()] != scene.background:
        return False
    things = [scene.first] if scene.second is None else [scene.first, scene.second]
    found = [pieces(labels, thing.color) for thing in things]
    wanted = {"two": 2, "three": 3}.get(scene.count, 1)
    if any(len(f) != wanted or any(p.shape != t.shape for p in f) for t, f in zip(things, found, strict=True)):
        return False
    if scene.relation:
        return _RELATIONS[scene.relation](found[0][0], found[1][0])
    return not scene.place or _PLACES[scene.place](found[0][0])


def label_colors(picture: Image.Image) -> Labels:
    """(Y, X): for each pixel the number of the colour, in the order of COLORS, that it is nearest to."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    palette = np.array([*COLORS.values(), *(shade(color) for color in COLORS)], np.float32)
    distances = (palette**2).sum(-1) - 2 * pixels @ palette.T  # less the pixel's own square, alike for all colours
    return distances.argmin(-1) % len(COLORS)


def pieces(labels: Labels, color: str) -> list[Piece]:
    """The regions of a colour that are too large for blur."""
    height, width = labels.shape
    # Opening takes away the fringe that an edge between two colours leaves in a third.
    mask = ndimage.binary_opening(ndimage.binary_closing(labels == list(COLORS).index(color)), iterations=1)
    regions, _ = ndimage.label(mask)
    found = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(regions), start=1):
        region = ndimage.binary_fill_holes(regions[rows, columns] == index)
        if region.sum() < LEAST_AREA * labels.size:
            continue
        y, x = (rows.start + rows.stop) / 2 / height, (columns.start + columns.stop) / 2 / width
        found.append(Piece(color, nearest_shape(region), x, y))
    return found


def nearest_shape(region: np.ndarray) -> str:
    """The shape whose mask overlaps the region most, both stretched to one square."""
    stretched = Image.fromarray(region.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE))
    mask = np.asarray(stretched) > 127
    return max(SHAPES, key=lambda shape: (mask & _template(shape)).sum() / (mask | _template(shape)).sum())


@cache
def _template(shape: str) -> np.ndarray:
    return np.asarray(shape_mask(shape, TEMPLATE)) > 127


_RELATIONS: dict[str, Callable[[Piece, Piece], bool]] = {
    "left of": lambda a, b: a.x < b.x - MARGIN,
    "right of": lambda a, b: a.x > b.x + MARGIN,
    "above": lambda a, b: a.y < b.y - MARGIN,
    "below": lambda a, b: a.y > b.y + MARGIN,
}
_PLACES: dict[str, Callable[[Piece], bool]] = {
    "in the center": lambda p: abs(p.x - 0.5) < MARGIN and abs(p.y - 0.5) < MARGIN,
    "at the top": lambda p: p.y < 0.5 - MARGIN and abs(p.x - 0.5) < MARGIN,
    "at the bottom": lambda p: p.y > 0.5 + MARGIN and abs(p.x - 0.5) < MARGIN,
    "at the left": lambda p: p.x < 0.5 - MARGIN and abs(p.y - 0.5) < MARGIN,
    "at the right": lambda p: p.x > 0.5 + MARGIN and abs(p.y - 0.5) < MARGIN,
}
