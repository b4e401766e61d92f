"""Scenes as pictures: flat shapes, drawn large and scaled down for smooth edges."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from .scenes import COLORS, Scene, Thing

OVERSAMPLING = 3
EXTENTS = {"small": 0.22, "": 0.32, "large": 0.44}
ROW_EXTENTS = {"small": 0.17, "": 0.25}
PLACE_CENTERS = {
    "in the center": (0.5, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "at the left": (0.25, 0.5),
    "at the right": (0.75, 0.5),
}
ROW_CENTERS = {"two": (0.3, 0.7), "three": (0.2, 0.5, 0.8)}
NEAR, FAR = 0.27, 0.73
JITTER, WIDE_JITTER = 0.03, 0.1


@dataclass(frozen=True)
class Placed:
    """A thing with its centre, as fractions of width and height, and its extent, as one of the shorter side."""

    thing: Thing
    x: float
    y: float
    extent: float


def place(scene: Scene, rng: random.Random) -> list[Placed]:
    """Where each thing of the scene is drawn; some play is left to chance."""

    def near(value: float, play: float = JITTER) -> float:
        return value + rng.uniform(-play, play)

    extent = EXTENTS[scene.first.size]
    if scene.count:
        across = near(0.5, WIDE_JITTER)
        row = [(near(along), across) for along in ROW_CENTERS[scene.count]]
        return [Placed(scene.first, x, y, ROW_EXTENTS[scene.first.size]) for x, y in row]
    if scene.second is None:
        x, y = PLACE_CENTERS[scene.place]
        return [Placed(scene.first, near(x), near(y), extent)]
    along = (NEAR, FAR) if scene.relation in ("left of", "above") else (FAR, NEAR)
    centers = [(near(a), near(0.5, WIDE_JITTER)) for a in along]
    if scene.relation in ("above", "below"):
        centers = [(x, y) for y, x in centers]
    things = (scene.first, scene.second)
    return [Placed(t, x, y, EXTENTS[t.size]) for t, (x, y) in zip(things, centers, strict=True)]


def draw(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """An RGB picture of the scene."""
    size = (width * OVERSAMPLING, height * OVERSAMPLING)
    picture = Image.new("RGB", size, COLORS[scene.background])
    for placed in place(scene, rng):
        side = placed.extent * min(size)
        left, top = placed.x * size[0] - side / 2, placed.y * size[1] - side / 2
        mask = Image.new("L", size)
        _draw_shape(ImageDraw.Draw(mask), placed.thing.shape, left, top, side)
        picture.paste(COLORS[placed.thing.color], mask=mask)
        if placed.thing.texture:
            pattern = Image.new("L", size)
            _draw_texture(ImageDraw.Draw(pattern), placed.thing.texture, left, top, side)
            picture.paste(shade(placed.thing.color), mask=ImageChops.multiply(mask, pattern))
    return picture.resize((width, height), Image.Resampling.BOX)


def shade(color: str) -> tuple[int, int, int]:
    """The second colour of a thing with a texture."""
    if color == "black":
        return (85, 85, 85)
    red, green, blue = (round(0.65 * part) for part in COLORS[color])
    return red, green, blue


def shape_mask(shape: str, side: int) -> Image.Image:
    """The shape alone, filling a square: 255 inside."""
    mask = Image.new("L", (side, side))
    _draw_shape(ImageDraw.Draw(mask), shape, 0, 0, side - 1)
    return mask


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: str, left: float, top: float, side: float) -> None:
    right, bottom = left + side, top + side
    if shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill=255)
    elif shape == "square":
        canvas.rectangle((left, top, right, bottom), fill=255)
    elif shape == "triangle":
        canvas.polygon(((left + right) / 2, top, right, bottom, left, bottom), fill=255)
    else:
        third = side / 3
        canvas.rectangle((left + third, top, right - third, bottom), fill=255)
        canvas.rectangle((left, top + third, right, bottom - third), fill=255)


def _draw_texture(canvas: ImageDraw.ImageDraw, texture: str, left: float, top: float, side: float) -> None:
    step = side / 5
    for i in range(6):
        if texture == "striped":
            canvas.rectangle((left, top + i * step, left + side, top + (i + 0.5) * step), fill=255)
        else:
            for j in range(6):
                x, y, radius = left + j * step, top + i * step, 0.28 * step
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def as_picture(image: Tensor) -> Image.Image:
    """Of (Y, X, 3) in 0..1."""
    return Image.fromarray((image * 255).round().to(torch.uint8).numpy())
