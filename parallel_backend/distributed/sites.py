"""Where extras act in an evaluation: by place in the network, what is done around that which the place computes.

Shapes: B rows, L this rank's tokens, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from .band import Band
from .band_image import BandImage

# A transformer block of a UNet by ComfyUI's names: "input", "middle" or "output", the number of the block there, its own in that.
Place: TypeAlias = tuple[str, int, int]
Inner: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class At:
    """The attention that is computed: `band` says how its tokens are spread, `kernel` computes its `heads`.

    Of one to the prompt, `to_kv` makes keys and values (B, T, 2 * D) of tokens, and those of the prompt are the band's, by `slot`.
    """

    place: Place
    band: Band
    kernel: str
    heads: int
    to_kv: Inner | None = None
    slot: str = ""


class Around(Protocol):
    """What an extra does at an attention of a UNet."""

    def __call__(self, inner: Inner, x_BLD: Tensor, at: At, /) -> Tensor:
        """In place of `inner(x)`, which it may call, once, several times or not at all. Comm: its own."""
        ...


class OnTokens(Protocol):
    """What an extra does with the tokens that come to a transformer block of a UNet."""

    def __call__(self, x_BLD: Tensor, band: Band, /) -> Tensor:
        """In their place. Comm: its own."""
        ...


class AfterBlock(Protocol):
    """What an extra does with that which an input block of a UNet gives, or its middle block."""

    def __call__(self, image: BandImage, /) -> BandImage:
        """In its place. Comm: its own, the same on every rank of the bands."""
        ...


class BeforeOutput(Protocol):
    """What an extra does with that which an output block of a UNet is about to join: `image` from the block before, and `skip`.

    Where nothing has come between, as without a middle block, both are the same object.
    """

    def __call__(self, image: BandImage, skip: BandImage, /) -> tuple[BandImage, BandImage]:
        """In their place, `skip` in its own size. Comm: as `AfterBlock`."""
        ...


def _by_place() -> defaultdict[Place, list[Around]]:
    return defaultdict(list)


@dataclass
class UNetSites:
    """Of a UNet. Of several that act around one place, the later ones are outside.

    Args:
        self_attended, cross_attended: around what is between the projections: x is queries, keys and values (B, L, 3 * D) of a
            self-attention, queries (B, L, D) of one to the prompt; the result goes to the projection out.
        self_layer: around the whole layer of a self-attention, projections included.
        block_input: on the tokens that come to a transformer block.
        after_input, after_skip: by the number of an input block, on what it gives, residuals added: before this becomes a skip
            connection, and after, on what goes on to the next block alone.
        after_middle: on what the middle block gives, or would give where there is none.
        before_output: on what each output block joins, with numbers in whose order they act.
    """

    self_attended: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    cross_attended: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    self_layer: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    block_input: defaultdict[Place, list[OnTokens]] = field(default_factory=lambda: defaultdict(list))
    after_input: defaultdict[int, list[AfterBlock]] = field(default_factory=lambda: defaultdict(list))
    after_skip: defaultdict[int, list[AfterBlock]] = field(default_factory=lambda: defaultdict(list))
    after_middle: list[AfterBlock] = field(default_factory=list)
    before_output: list[tuple[int, BeforeOutput]] = field(default_factory=list)

    @property
    def between_blocks(self) -> bool:
        """Whether anything acts there."""
        return bool(self.after_input or self.after_skip or self.after_middle or self.before_output)


@dataclass
class TransformerSites:
    """Of an MMDiT.

    Args:
        skipped: blocks that hand text and image tokens on as they came.
        beside: by block, what is added to what the image's tokens take from the joint attention: of the block's `Attend` and the
            image's `Stream`.
    """

    skipped: set[int] = field(default_factory=set)
    beside: defaultdict[int, list[Callable[[Any, Any], Tensor]]] = field(default_factory=lambda: defaultdict(list))


def around(works: Sequence[Around], inner: Inner, at: At) -> Inner:
    """`inner` with all of these around it."""
    for work in works:
        inner = partial(_done, work, inner, at)
    return inner


def _done(work: Around, inner: Inner, at: At, x_BLD: Tensor) -> Tensor:
    return work(inner, x_BLD, at)
