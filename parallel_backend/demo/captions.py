"""Captions of the demo's grammar as SD3 or SDXL conditioning, without a text encoder.

Each word of meaning becomes one context token: a fixed random vector of the word and of its part in the sentence (the
first thing's colour is another token than the second's). The pooled prompt is their sum. Nothing is learned here.
Shapes: B rows, W words, filled up with word 0, which means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .scenes import COLORS, COUNTS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, Thing, parse

WORDS = 12
# Of context and of pooled prompt.
SD3_WIDTHS, SDXL_WIDTHS = (4096, 2048), (2048, 1280)


def encode(captions: Sequence[str], widths: tuple[int, int] = SD3_WIDTHS) -> tuple[Tensor, Tensor]:
    """(B, 12, 4096) context and (B, 2048) pooled, or of other widths.

    The empty caption is what an unconditional branch takes.

    Raises: InputError: a caption is outside the grammar.
    """
    scenes = [parse(caption) if caption.strip() else None for caption in captions]
    return embed(torch.tensor([word_ids(scene) for scene in scenes]), widths)


@dataclass(frozen=True)
class Captions:
    """These captions as the text encoders of the demo's checkpoints: see `text_encoders.TextEncoders`."""

    widths: tuple[int, int] = SD3_WIDTHS
    default_size: int | None = 128

    def encode(self, prompts: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """No prompt is the empty caption. Raises: InputError: a caption is outside the grammar."""
        context, pooled = encode([prompt or "" for prompt in prompts], self.widths)
        return context.to(dtype), pooled.to(dtype)


def word_ids(scene: Scene | None) -> list[int]:
    """The scene's words as numbers, 12 of them; of None, no words."""
    found = [_numbers()[part] for part in _parts(scene)] if scene is not None else []
    return found + [0] * (WORDS - len(found))


def embed(ids_BW: Tensor, widths: tuple[int, int] = SD3_WIDTHS) -> tuple[Tensor, Tensor]:
    """(B, W, 4096) context and (B, 2048) pooled of word numbers, or of other widths."""
    context, pooled = _tables(*widths)
    return context[ids_BW], pooled[ids_BW].sum(1)


def _parts(scene: Scene) -> list[tuple[str, str]]:
    """(part in the sentence, word) pairs."""
    parts = [("background", scene.background), *_thing_parts("first", scene.first)]
    parts += _thing_parts("second", scene.second) if scene.second is not None else []
    return parts + [(part, word) for part in ("place", "relation", "count") if (word := getattr(scene, part))]


def _thing_parts(which: str, thing: Thing) -> list[tuple[str, str]]:
    words = {"size": thing.size, "texture": thing.texture, "color": thing.color, "shape": thing.shape}
    return [(f"{which} {part}", word) for part, word in words.items() if word]


@cache
def _numbers() -> dict[tuple[str, str], int]:
    words = {"size": SIZES, "texture": TEXTURES, "color": tuple(COLORS), "shape": SHAPES}
    of_part = {f"{which} {part}": known for which in ("first", "second") for part, known in words.items()}
    of_part |= {"background": tuple(COLORS), "place": PLACES, "relation": RELATIONS, "count": COUNTS}
    pairs = [(part, word) for part, known in of_part.items() for word in known if word]
    return {pair: number for number, pair in enumerate(pairs, start=1)}


@cache
def _tables(context_width: int, pooled_width: int) -> tuple[Tensor, Tensor]:
    """Context and pooled vectors, a row for each word number; nothing has no pooled vector."""
    pairs = [("", ""), *_numbers()]
    context = np.stack([_vector("context", *pair, context_width) for pair in pairs])
    pooled = np.stack([_vector("pooled", *pair, pooled_width) for pair in pairs]) / WORDS**0.5
    pooled[0] = 0
    return torch.from_numpy(context), torch.from_numpy(pooled)


def _vector(use: str, part: str, word: str, width: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    seed = int.from_bytes(hashlib.sha256(f"{use}/{part}/{word}".encode()).digest()[:4], "little")
    # RandomState: numpy promises that its stream never changes, and trained weights depend on it.
    return np.random.RandomState(seed).standard_normal(width).astype(np.float32)
