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
from torch import Tensor

from parallel_backend.demo.captions import word_ids
from parallel_backend.demo.drawing import draw
from parallel_backend.demo.scenes import Scene, training_scenes

from .config import TrainSpec

CROP = 48

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Pixels in 0..1 or latents (B, C, Y, X), and the word numbers (B, W) of their captions."""

    images: Tensor
    words: Tensor


class Source(Protocol):
    def batch(self, number: int) -> Batch: ...


class PixelSource:
    """Crops of freshly drawn pictures."""

    def __init__(self, spec: TrainSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank

    def batch(self, number: int) -> Batch:
        rng = random.Random(f"{self.spec.seed}/{self.rank}/{number}")
        crops = [self._crop(scene, rng) for scene in islice(training_scenes(rng.getrandbits(62)), self.spec.batch)]
        return Batch(torch.stack(crops), torch.zeros(len(crops), 0, dtype=torch.int64))

    def _crop(self, scene: Scene, rng: random.Random) -> Tensor:
        width, height = rng.choice(self.spec.buckets)
        left, top = rng.randrange(width - CROP + 1), rng.randrange(height - CROP + 1)
        return pixels(draw(scene, width, height, rng).crop((left, top, left + CROP, top + CROP)))


class LatentSource:
    """Latents of a growing set of scenes: each is drawn and encoded once, when a batch first holds it."""

    def __init__(self, spec: TrainSpec, rank: int, encode: Encode) -> None:
        """`encode` takes pixels (B, 3, Y, X) in 0..1 to latents."""
        self.spec, self.rank, self.encode = spec, rank, encode
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def batch(self, number: int) -> Batch:
        rng = random.Random(f"{self.spec.seed}/{self.rank}/{number}")
        available = self.spec.first_scenes + number * self.spec.fresh_scenes
        bucket, buckets = rng.randrange(len(self.spec.buckets)), len(self.spec.buckets)
        chosen = [rng.randrange(max(1, available // buckets)) * buckets + bucket for _ in range(self.spec.batch)]
        self._learn(sorted({index for index in chosen if index not in self._known}))
        latents, words = zip(*(self._known[index] for index in chosen), strict=True)
        return Batch(torch.stack(latents).float(), torch.stack(words))

    def _learn(self, indices: list[int]) -> None:
        if not indices:
            return
        images, words = [], []
        for index in indices:
            rng = random.Random(f"scene {self.spec.seed}/{self.rank}/{index}")
            scene = next(training_scenes(rng.getrandbits(62)))
            images.append(pixels(draw(scene, *self.spec.buckets[index % len(self.spec.buckets)], rng)))
            words.append(torch.tensor(word_ids(scene)))
        # Half precision, since thousands of latents stay in memory.
        # One by one: a latent must not depend, by rounding, on what else was new at its time.
        latents = torch.cat([self.encode(image[None]) for image in images]).half()
        self._known |= {i: (latent, w) for i, latent, w in zip(indices, latents, words, strict=True)}


def pixels(picture: object) -> Tensor:
    """(3, Y, X) in 0..1 of a PIL picture."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255
