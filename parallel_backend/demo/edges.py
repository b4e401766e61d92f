"""Edges of a picture: the control image of the demo's ControlNet."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor, from_numpy, stack

from .drawing import draw
from .scenes import Scene

# Of the blur, in pixels, and of a step between colours in 0..1 that still counts, as Sobel's filter tells it.
BLUR = 1.0
LEAST_STEP = 0.5
# Across an edge, by the eighths of a turn of its gradient: (rows, columns) to the next pixel.
_ACROSS = ((0, 1), (1, 1), (1, 0), (1, -1))


def edges(picture: Image.Image) -> Image.Image:
    """White lines, a pixel wide, on black where colours meet; ComfyUI's Canny draws much the same.

    Source: Canny 1986, without hysteresis; of each pixel the channel with the steepest gradient.
    """
    values = np.asarray(picture.convert("RGB"), np.float32) / 255
    smooth = ndimage.gaussian_filter(values, (BLUR, BLUR, 0))
    down, right = (ndimage.sobel(smooth, axis) for axis in (0, 1))
    channel = np.hypot(down, right).argmax(-1)[..., None]
    down, right = (np.take_along_axis(part, channel, -1)[..., 0] for part in (down, right))
    steepness = np.hypot(down, right)
    octant = np.rint(np.arctan2(down, right) / (np.pi / 4)).astype(int) % len(_ACROSS)
    drawn = steepness >= LEAST_STEP
    for number, (rows, columns) in enumerate(_ACROSS):
        before, after = (np.roll(steepness, (sign * rows, sign * columns), (0, 1)) for sign in (1, -1))
        drawn &= (octant != number) | ((steepness > before) & (steepness >= after))
    return Image.fromarray(drawn.astype(np.uint8) * 255)


def hints(pictures: Sequence[Image.Image]) -> Tensor:
    """(B, 3, Y, X) in 0..1: their edges as a ControlNet takes them."""
    drawn = [np.asarray(edges(picture), np.float32) / 255 for picture in pictures]
    return stack([from_numpy(lines) for lines in drawn])[:, None].expand(-1, 3, -1, -1)


def pictures_of(scenes: Sequence[Scene], size: int) -> list[Image.Image]:
    """One of each scene, always the same."""
    rng = random.Random(1)
    return [draw(scene, size, size, rng) for scene in scenes]
