"""Scenes of coloured shapes and their captions: one grammar, read both ways.

a red circle left of a large striped blue square on a yellow background
a small green cross at the top on a black background
three purple triangles on a white background
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import InputError

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (140, 60, 170),
    "orange": (245, 140, 30),
    "cyan": (60, 205, 215),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SIZES = ("small", "", "large")
TEXTURES = ("", "striped", "dotted")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("in the center", "at the top", "at the bottom", "at the left", "at the right")
COUNTS = ("two", "three")
# For a first look.
CAPTIONS = (
    "a red circle left of a large blue square on a yellow background",
    "a small green cross at the top on a black background",
    "three purple triangles on a white background",
    "a large orange circle above a small cyan square on a blue background",
    "a white triangle right of a red cross on a green background",
    "two yellow squares on a purple background",
)
# One caption of twenty is never trained on.
HELD_OUT_SHARE = 20


@dataclass(frozen=True)
class Thing:
    color: str
    shape: str
    size: str = ""
    texture: str = ""

    def words(self, plural: bool = False) -> str:
        shape = PLURALS[self.shape] if plural else self.shape
        return " ".join(word for word in (self.size, self.texture, self.color, shape) if word)


@dataclass(frozen=True)
class Scene:
    """One thing at a place, two things in a relation, or several of one thing in a row."""

    background: str
    first: Thing
    place: str = ""
    relation: str = ""
    second: Thing | None = None
    count: str = ""

    def caption(self) -> str:
        end = f"on a {self.background} background"
        if self.count:
            return f"{self.count} {self.first.words(plural=True)} {end}"
        if self.second is not None:
            return f"a {self.first.words()} {self.relation} a {self.second.words()} {end}"
        return f"a {self.first.words()} {self.place} {end}"


def known_words() -> list[str]:
    """Every word that a caption may hold."""
    phrases = [*COLORS, *SHAPES, *PLURALS.values(), *SIZES, *TEXTURES, *RELATIONS, *PLACES, *COUNTS, "a on background"]
    return sorted({word for phrase in phrases for word in phrase.split()})


def random_scene(rng: random.Random) -> Scene:
    """Any scene of the grammar; things and background differ in colour."""
    background, *colors = rng.sample(list(COLORS), 3)
    first, second = (
        Thing(color, rng.choice(SHAPES), rng.choice(SIZES), rng.choice(("", *TEXTURES))) for color in colors
    )
    kind = rng.random()
    if kind < 0.25:
        return Scene(background, first, place=rng.choice(PLACES))
    if kind < 0.85:
        return Scene(background, first, relation=rng.choice(RELATIONS), second=second)
    if first.size == "large":
        first = Thing(first.color, first.shape, "", first.texture)
    return Scene(background, first, count=rng.choice(COUNTS))


def is_held_out(caption: str) -> bool:
    return hashlib.sha256(caption.encode()).digest()[0] % HELD_OUT_SHARE == 0


def training_scenes(seed: int) -> Iterator[Scene]:
    """Scenes without end, none of a held-out caption."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng)
        if not is_held_out(scene.caption()):
            yield scene


def held_out_scenes(count: int = 100) -> list[Scene]:
    """Always the same scenes, whose captions no training sees."""
    rng = random.Random(20_261_121)
    found = (scene for scene in iter(lambda: random_scene(rng), None) if is_held_out(scene.caption()))
    return list(islice(found, count))


def parse(caption: str) -> Scene:
    """The scene that a caption tells of.

    Raises: InputError: a word that is not known, or words in an order that the grammar hasn't.
    """
    words = caption.lower().replace(",", " ").rstrip(".").split()
    known = known_words()
    if unknown := [word for word in words if word not in known]:
        raise InputError(f"The demo's captions have no word {unknown[0]!r}.", f"Its words are: {', '.join(known)}.")
    return _Reader(caption, words).scene()


class _Reader:
    """Reads a caption from left to right."""

    def __init__(self, caption: str, words: list[str]) -> None:
        self.caption, self.words = caption, words

    def scene(self) -> Scene:
        count = self._one_of(COUNTS)
        if count:
            scene_first, place, relation, second = self._thing(plural=True), "", "", None
        else:
            self._take("a")
            scene_first = self._thing()
            relation, place = self._one_of(RELATIONS), ""
            second = None
            if relation:
                self._take("a")
                second = self._thing()
            else:
                place = self._one_of(PLACES) or PLACES[0]
        self._take("on a")
        background = self._one_of(tuple(COLORS)) or self._refuse("a colour")
        self._take("background")
        if self.words:
            self._refuse("the end")
        return Scene(background, scene_first, place, relation, second, count)

    def _thing(self, plural: bool = False) -> Thing:
        size, texture = self._one_of(SIZES), self._one_of(TEXTURES)
        color = self._one_of(tuple(COLORS)) or self._refuse("a colour")
        shapes = {PLURALS[s] if plural else s: s for s in SHAPES}
        shape = self._one_of(tuple(shapes)) or self._refuse("shapes" if plural else "a shape")
        return Thing(color, shapes[shape], size, texture)

    def _one_of(self, phrases: tuple[str, ...]) -> str:
        for phrase in filter(None, phrases):
            if self.words[: len(phrase.split())] == phrase.split():
                del self.words[: len(phrase.split())]
                return phrase
        return ""

    def _take(self, phrase: str) -> None:
        if not self._one_of((phrase,)):
            self._refuse(repr(phrase))

    def _refuse(self, wanted: str) -> str:
        found = repr(self.words[0]) if self.words else "the end"
        raise InputError(
            f"The caption {self.caption!r} has {found} where {wanted} is needed.",
            f"Write it like {Scene('yellow', Thing('red', 'circle'), '', 'left of', Thing('blue', 'square')).caption()!r}.",
        )
