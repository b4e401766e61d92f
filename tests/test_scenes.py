"""The demo's grammar, pictures, conditioning and score: each read back by another."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch

from parallel_backend.demo.captions import encode, word_ids
from parallel_backend.demo.drawing import draw
from parallel_backend.demo.scenes import held_out_scenes, is_held_out, known_words, parse, training_scenes
from parallel_backend.demo.score import shows
from parallel_backend.errors import InputError

SIZES = [(128, 128), (160, 96), (96, 160), (256, 256)]


def test_every_caption_is_read_back_as_its_scene() -> None:
    scenes = [*held_out_scenes(300), *islice(training_scenes(1), 300)]
    assert all(parse(scene.caption()) == scene for scene in scenes)
    assert {word for scene in scenes for word in scene.caption().split()} == set(known_words())


def test_held_out_captions_are_never_trained_on() -> None:
    held_out = {scene.caption() for scene in held_out_scenes(100)}
    assert all(is_held_out(caption) for caption in held_out)
    assert not any(is_held_out(scene.caption()) for scene in islice(training_scenes(2), 2000))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_score_finds_what_was_drawn_and_nothing_else(size: tuple[int, int]) -> None:
    scenes, rng = held_out_scenes(100), random.Random(3)
    pictures = [draw(scene, *size, rng) for scene in scenes]
    assert sum(shows(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)) >= 97
    others = scenes[1:] + scenes[:1]
    assert not any(shows(picture, scene) for picture, scene in zip(pictures, others, strict=True))


def test_captions_become_conditioning_of_sd3s_shapes() -> None:
    captions = [scene.caption() for scene in held_out_scenes(20)]
    context, pooled = encode([*captions, ""])
    assert context.shape == (21, 12, 4096) and pooled.shape == (21, 2048)
    assert len({tuple(word_ids(parse(caption))) for caption in captions}) == len(set(captions))
    assert pooled[-1].abs().sum() == 0 and torch.equal(encode([captions[3]])[0][0], context[3])


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a red dog on a white background", r"no word 'dog'.*words are: .*circle"),
        ("a red circle", r"has the end where 'on a' is needed"),
        ("a circle red on a white background", r"has 'circle' where a colour is needed"),
        ("a red circle on a white background background", r"where the end is needed"),
        ("two red circle on a white background", r"has 'circle' where shapes is needed"),
    ],
)
def test_captions_outside_the_grammar_are_refused_by_the_word(caption: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse(caption)
