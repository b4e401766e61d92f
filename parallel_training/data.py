"""Batches of rendered scenes: pixels for an autoencoder, latents with captions for the rest.

A batch is a function of the run's seed, the loader rank and its own number alone, so that a resumed run goes on as if it
had not stopped. Shapes: B images, C channels, Y X pixels or latent cells, W words of a caption.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parallel_backend.demo.captions import word_ids
from parallel_backend.demo.drawing import draw
from parallel_backend.demo.edges import hints as edges_of
from parallel_backend.demo.scenes import Scene, training_scenes

from .config import TrainSpec

# Small crops alone teach fast, but also that an edge of the picture, where layers pad with zeros, is never far.
CROPS = (32, 64)
BATCH_SIDE = 64

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Pixels in 0..1 or latents (B, C, Y, X), the word numbers (B, W) of their captions, and the edges (B, 1, 8Y, 8X) in 0..1 of the
    latents' pictures, (B, 0, 0, 0) for a task without use for them."""

    images: Tensor
    words: Tensor
    hints: Tensor


class Source(Protocol):
    def batch(self, number: int) -> Batch: ...


class PixelSource:
    """Freshly drawn pictures: `spec.batch` crops of `spec.crop` pixels a side; without one, sizes are mixed.

    Mixed batches are crops of one size or whole pictures, as many as have the pixels of `spec.batch` crops of 64 a side.
    """

    def __init__(self, spec: TrainSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank

    def batch(self, number: int) -> Batch:
        rng = random.Random(f"{self.spec.seed}/{self.rank}/{number}")
        scenes = training_scenes(rng.getrandbits(62))
        if self.spec.crop:
            images = [self._crop(scene, self.spec.crop, rng) for scene in islice(scenes, self.spec.batch)]
        elif side := rng.choice((*CROPS, 0)):
            images = [self._crop(scene, side, rng) for scene in islice(scenes, self._worth(side, side))]
        else:
            size = rng.choice(self.spec.buckets)
            images = [pixels(draw(scene, *size, rng)) for scene in islice(scenes, self._worth(*size))]
        return Batch(torch.stack(images), torch.zeros(len(images), 0, dtype=torch.int64), no_hints(len(images)))

    def _worth(self, width: int, height: int) -> int:
        return max(1, round(self.spec.batch * BATCH_SIDE**2 / (width * height)))

    def _crop(self, scene: Scene, side: int, rng: random.Random) -> Tensor:
        width, height = rng.choice(self.spec.buckets)
        left, top = rng.randrange(width - side + 1), rng.randrange(height - side + 1)
        return pixels(draw(scene, width, height, rng).crop((left, top, left + side, top + side)))


class LatentSource:
    """Latents of a growing set of scenes: each is drawn and encoded once, when a batch first holds it."""

    def __init__(self, spec: TrainSpec, rank: int, encode: Encode, *, with_edges: bool = False) -> None:
        """`encode` takes pixels (B, 3, Y, X) in 0..1 to latents."""
        self.spec, self.rank, self.encode, self.with_edges = spec, rank, encode, with_edges
        self._known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def batch(self, number: int) -> Batch:
        rng = random.Random(f"{self.spec.seed}/{self.rank}/{number}")
        available = self.spec.first_scenes + number * self.spec.fresh_scenes
        bucket, buckets = rng.randrange(len(self.spec.buckets)), len(self.spec.buckets)
        chosen = [rng.randrange(max(1, available // buckets)) * buckets + bucket for _ in range(self.spec.batch)]
        self._learn(sorted({index for index in chosen if index not in self._known}))
        latents, words, hints = zip(*(self._known[index] for index in chosen), strict=True)
        # Each to fp32 first: below a CPU's autocast, half precision can't be stacked.
        return Batch(
            torch.stack([latent.float() for latent in latents]), torch.stack(words), torch.stack(hints).float()
        )

    def _learn(self, indices: list[int]) -> None:
        if not indices:
            return
        images, words, hints = [], [], []
        for index in indices:
            rng = random.Random(f"scene {self.spec.seed}/{self.rank}/{index}")
            scene = next(training_scenes(rng.getrandbits(62)))
            picture = draw(scene, *self.spec.buckets[index % len(self.spec.buckets)], rng)
            images.append(pixels(picture))
            # Lines are white or black: bytes hold them.
            hints.append(hint_of(picture).byte() if self.with_edges else no_hints(1)[0])
            words.append(torch.tensor(word_ids(scene)))
        # Half precision, since thousands of latents stay in memory.
        # One by one: a latent must not depend, by rounding, on what else was new at its time.
        latents = torch.cat([self.encode(image[None]) for image in images]).half()
        self._known |= dict(zip(indices, zip(latents, words, hints, strict=True), strict=True))


def hint_of(picture: Image.Image) -> Tensor:
    """(1, Y, X) in 0..1: the picture's edges."""
    return edges_of([picture])[0, :1]


def no_hints(rows: int) -> Tensor:
    return torch.zeros(rows, 0, 0, 0)


def pixels(picture: object) -> Tensor:
    """(3, Y, X) in 0..1 of a PIL picture."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255
