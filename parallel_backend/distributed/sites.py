"""Where extras act in an evaluation: by place in the network, what is done around that which the place computes.

Shapes: B rows, L this rank's tokens, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

from .band import Band
from .band_image import BandImage
from .mesh import MeshAxis

# A transformer block of a UNet by ComfyUI's names: "input", "middle" or "output", the number of the block there, its own in that.
Place: TypeAlias = tuple[str, int, int]
# A block of a UNet: the first two parts of such a place.
BlockName: TypeAlias = tuple[str, int]
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


class NormRows(Protocol):
    """Whose statistics a group norm joins to those of each row."""

    def __call__(self, every_S2BG: Tensor, /) -> Tensor:
        """Of this rank's rows mean and variance, by parts of the image and groups; those of the other rows, of the same shape.

        Comm: its own, the same on every rank of the bands.
        """
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


class Convolve(Protocol):
    """The convolution of a downsampling."""

    def __call__(self, x_BCYX: Tensor, /, *, stride: int, dilation: int, columns: int) -> Tensor:
        """By its kernel, of rows that have what is around them with them, and with so many columns of zeros on both sides."""
        ...


class AtDownsample(Protocol):
    """What an extra does in place of an input block that is a downsampling."""

    def __call__(self, image: BandImage, convolve: Convolve, /) -> BandImage:
        """Of what comes to it; `convolve` is called once on every rank. Comm: as `AfterBlock`."""
        ...


class AtUpsample(Protocol):
    """What an extra does in an upsampling of a UNet around its convolution, which keeps sides as they are."""

    def __call__(self, image: BandImage, skip: BandImage, convolve: Callable[[BandImage], BandImage], /) -> BandImage:
        """Of what comes to it, in the size of `skip`, with which `convolve` is called once on every rank. Comm: as `AfterBlock`."""
        ...


class BeforeOutput(Protocol):
    """What an extra does with that which an output block of a UNet is about to join: `image` from the block before, and `skip`.

    `number` is the block's. Where nothing has come between, as without a middle block, both are the same object.
    """

    def __call__(self, image: BandImage, skip: BandImage, number: int, /) -> tuple[BandImage, BandImage]:
        """In their place, `skip` in its own size. Comm: as `AfterBlock`."""
        ...


W = TypeVar("W")


def _in_order(works: Sequence[tuple[int, W]]) -> list[tuple[int, W]]:
    return sorted(works, key=itemgetter(0))


def _by_place() -> defaultdict[Place, list[Around]]:
    return defaultdict(list)


@dataclass
class UNetSites:
    """Of a UNet. Of several that act around one place, the later ones are outside.

    Args:
        self_attended, cross_attended: around what is between the projections: x is queries, keys and values (B, L, 3 * D) of a
            self-attention, queries (B, L, D) of one to the prompt; the result goes to the projection out.
        of_regions: around an attention to one of a row's regional prompts, by place and the prompt's number.
        self_layer, cross_layer: around the whole layer of a self-attention, or of one to the prompt, projections included.
        self_projected: around the projection of a self-attention: x (B, L, D) comes, and queries, keys and values go on (B, L, 3 * D).
        norm_rows: see `NormRows`; of all group norms.
        block_input: on the tokens that come to a transformer block.
        after_input, after_skip: by the number of an input block, on what it gives, residuals added: before this becomes a skip
            connection, and after, on what goes on to the next block alone; with numbers in whose order they act.
        after_middle: on what the middle block gives, or would give where there is none.
        before_output: on what each output block joins, with numbers likewise.
        downsample, upsample: by the number of an input block that is a downsampling, and of an output block that ends in the opposite.
        scales_residuals: a ControlNet's are added in the size of the image that they come to.
    """

    self_attended: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    cross_attended: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    of_regions: defaultdict[tuple[Place, int], list[Around]] = field(default_factory=lambda: defaultdict(list))
    self_layer: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    cross_layer: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    self_projected: defaultdict[Place, list[Around]] = field(default_factory=_by_place)
    norm_rows: NormRows | None = None
    block_input: defaultdict[Place, list[OnTokens]] = field(default_factory=lambda: defaultdict(list))
    after_input: defaultdict[int, list[tuple[int, AfterBlock]]] = field(default_factory=lambda: defaultdict(list))
    after_skip: defaultdict[int, list[tuple[int, AfterBlock]]] = field(default_factory=lambda: defaultdict(list))
    after_middle: list[AfterBlock] = field(default_factory=list)
    before_output: list[tuple[int, BeforeOutput]] = field(default_factory=list)
    downsample: dict[int, AtDownsample] = field(default_factory=dict)
    upsample: dict[int, AtUpsample] = field(default_factory=dict)
    scales_residuals: bool = False

    @property
    def between_blocks(self) -> bool:
        """Whether anything acts there."""
        works = self.after_input, self.after_skip, self.after_middle, self.before_output, self.downsample, self.upsample
        return any(works)

    def after_block(self, number: int, image: BandImage) -> tuple[BandImage, BandImage]:
        """What an input block gives: as a skip connection, and to the next block."""
        for _, work in _in_order(self.after_input.get(number, ())):
            image = work(image)
        skip = image
        for _, work in _in_order(self.after_skip.get(number, ())):
            image = work(image)
        return skip, image

    def before_block(self, number: int, image: BandImage, skip: BandImage) -> tuple[BandImage, BandImage]:
        """What an output block joins."""
        for _, join in _in_order(self.before_output):
            image, skip = join(image, skip, number)
        return image, skip


@dataclass(frozen=True)
class FurtherText:
    """Rows of text beyond those of the latents, which go through all blocks of an MMDiT after them.

    Args:
        context_BLE, pooled_BA: their prompts, as long as the others.
        beside: by row, the row of latents whose image tokens take part in its attention.
        guided: (what image tokens of those rows take beside their own text, what they take beside this one, the axis over which
            heads are spread) -> what they go on with; (B, L, F) each.
    """

    context_BLE: Tensor
    pooled_BA: Tensor
    beside: tuple[int, ...]
    guided: Callable[[Tensor, Tensor, MeshAxis], Tensor]


@dataclass
class TransformerSites:
    """Of an MMDiT.

    Args:
        further: text beyond that of the latents' rows.
        skipped: blocks that hand text and image tokens on as they came.
        beside: by block, what is added to what the image's tokens take from the joint attention: of the block's `Attend` and the
            image's `Stream`.
    """

    further: FurtherText | None = None
    skipped: set[int] = field(default_factory=set)
    beside: defaultdict[int, list[Callable[[Any, Any], Tensor]]] = field(default_factory=lambda: defaultdict(list))


def around(works: Sequence[Around], inner: Inner, at: At) -> Inner:
    """`inner` with all of these around it."""
    for work in works:
        inner = partial(_done, work, inner, at)
    return inner


def _done(work: Around, inner: Inner, at: At, x_BLD: Tensor) -> Tensor:
    return work(inner, x_BLD, at)
