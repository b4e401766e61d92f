"""What hangs inside a model, as requests name it: one struct a kind, of numbers, names and tensors.

In a request a tensor is its place among the request's tensors (T is int); a client gives the tensor itself (T is Tensor), and a
rank has it again. Which fields hold tensors, each struct says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")
X = TypeVar("X", bound="ExtraSpec")
# A method of `Rescale` alone.
POOLED = "avg_pool2d"
# See distributed/sites.py.
PlaceName: TypeAlias = tuple[str, int, int]


class ExtraSpec(Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Of any kind.

    Args:
        start, end: sigmas between which it acts; None from the first, or to the last.
    """

    start: float | None = None
    end: float | None = None

    tensor_fields: ClassVar[tuple[str, ...]] = ()
    # An evaluation with it gives a tensor of its rows back, after the output.
    reports: ClassVar[bool] = False
    # It mixes rows of both prompts, which are evaluated at once.
    pairs: ClassVar[bool] = False

    # Those of them that are other tensors at each evaluation, and are not kept.
    fresh_fields: ClassVar[tuple[str, ...]] = ()

    def is_at(self, sigma: float) -> bool:
        """Whether it acts there."""
        return (self.end or 0.0) <= sigma and (self.start is None or sigma <= self.start)

    def each(self: X, change: Callable[[Any], Any], fresh: Callable[[Any], Any] | None = None) -> X:
        """`change` done to every tensor, in a fixed order; `fresh` to those of `fresh_fields`, where it is given."""
        changes = {name: fresh or change if name in self.fresh_fields else change for name in self.tensor_fields}
        return msgspec.structs.replace(self, **{name: _each(getattr(self, name), f) for name, f in changes.items()})

    def tensors(self) -> list[Any]:
        """Those that it names, each as often as it does."""
        found: list[Any] = []
        self.each(found.append)
        return found


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_each(part, change) for part in value]
    return None if value is None else change(value)


class SkipBlocks(ExtraSpec, frozen=True):
    """These joint blocks of an MMDiT hand text and image tokens on as they came: skip-layer guidance's weaker model."""

    blocks: list[int]


class PerturbedAttention(ExtraSpec, frozen=True):
    """Self-attentions of a UNet in which each token sees itself alone.

    Source: perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377), section 4.
    """

    places: list[PlaceName]


class JointImagePrompt(ExtraSpec, Generic[T], frozen=True):
    """Beside the joint attention of an MMDiT's blocks, one of the image's queries to image and image prompt; its result is added.

    Keys and values are made of the image prompt's tokens in the ranks, by each block's matrices after a layer norm that is shifted
    and scaled: the matrices are sent once, tokens, shifts and scales change with the timestep.
    Source: InstantX's IP-Adapter for SD3.5.

    Args:
        norms: by block, (3, H), weights of further RMS norms of the image's queries and keys, after the block's own, and of the image
            prompt's keys.
        matrices: by block, (2, N * H, E), of keys and of values.
        tokens: by branch, (sigmas, rows, T, E), rows 1 or as many as latents.
        modulation: by branch, (sigmas, rows, blocks, 2, E), what the normed tokens are shifted by, and 1 less than what they are
            multiplied by.
        sigmas: those of tokens and modulation; it acts at these alone. Where none is named, there is one of each, at whatever sigma.
        weight: what the result is multiplied by.
    """

    blocks: list[int]
    norms: list[T]
    matrices: list[T]
    tokens: dict[int, T]
    modulation: dict[int, T]
    sigmas: list[float] = []
    weight: float = 1.0

    tensor_fields: ClassVar[tuple[str, ...]] = ("norms", "matrices", "tokens", "modulation")
    fresh_fields: ClassVar[tuple[str, ...]] = ("tokens", "modulation")


# How the output for a picture comes to that for the prompt: as it is; its part that is orthogonal to that one, over all tokens; or
# with so much of the other part, too, as the share of attention that the identity's tokens get.
ImagePromptForm: TypeAlias = Literal["added", "orthogonal", "partly_orthogonal"]
# The first ones of a picture's, which PuLID makes of the face alone.
IDENTITY_TOKENS = 5


class ImagePrompt(ExtraSpec, Generic[T], frozen=True):
    """Attention to a picture's keys and values beside that to the prompt, at cross-attentions of a UNet.

    Args:
        tokens: of the picture, at each of the places.
        rows: of which prompt each row of the tensors is (0 cond, 1 uncond), and for which latent of its batch; None for all of them.
        keys_values: (rows, N), place after place (tokens, 2 * width); the values times the weight that the place has.
        masks: (rows, M), place after place how much each of the whole latent's tokens there takes; None where all take all of it.
        regions: beside regional prompts, to the outputs for which of a row's prompts it is added: 0 the row's own, which uncond has
            alone. None where there are none.
    Source: IP-Adapter (Ye et al. 2023, arXiv 2308.06721), equation 5.
    """

    places: list[PlaceName]
    tokens: list[int]
    rows: list[tuple[int, int | None]]
    keys_values: T
    masks: T | None = None
    form: ImagePromptForm = "added"
    regions: list[int] | None = None

    tensor_fields: ClassVar[tuple[str, ...]] = ("keys_values", "masks")


class SparseAttention(ExtraSpec, frozen=True):
    """Attentions to the prompt of a UNet whose scores are led away from softmax, towards a map that gives most of them nothing.

    Source: PLADIS (Kim and Sim 2025, arXiv 2503.07677).

    Args:
        scale: how often the sparse map counts; softmax counts 1 - scale times.
        sparse: of SPARSE_MAPS in extras/sparse_attention.py.
    """

    places: list[PlaceName]
    scale: float
    sparse: str


class ShuffledTokens(ExtraSpec, Generic[T], frozen=True):
    """Transformer blocks of a UNet to which tokens come in another order, in which they stay.

    Source: token perturbation guidance (Rajabi et al. 2025, arXiv 2506.10036).

    Args:
        orders: (N,) int64, place after place which token, counted row by row in the whole picture, comes to each token's place.
    """

    places: list[PlaceName]
    orders: T

    tensor_fields: ClassVar[tuple[str, ...]] = ("orders",)
    fresh_fields: ClassVar[tuple[str, ...]] = ("orders",)


class BlurQueries(ExtraSpec, frozen=True):
    """Self-attentions of a UNet whose queries are blurred over the picture: smoothed energy guidance's weaker model.

    Source: Hong 2024 (arXiv 2408.00760), section 4.2.

    Args:
        blur: the Gaussian's standard deviation in tokens; None: each query is the mean of all.
    """

    places: list[PlaceName]
    blur: float | None


class RegionalPrompts(ExtraSpec, Generic[T], frozen=True):
    """Attention of cond's rows to several prompts, at all cross-attentions of a UNet: of each what its mask says. Uncond has none.

    Args:
        strength: of the row's own prompt, whose keys and values are times that.
        keys, values: the other prompts (1, tokens, context width), of which keys and values are made; no values where they are the same.
        masks: by scale of the picture, (prompts, tokens of the whole picture), the own prompt first; of each token they sum to 1.
    """

    strength: float
    keys: list[T]
    values: list[T] | None
    masks: list[T]

    tensor_fields: ClassVar[tuple[str, ...]] = ("keys", "values", "masks")


class SplitPrompt(ExtraSpec, frozen=True):
    """Of a prompt's tokens, at all cross-attentions of a UNet, those of even number are keys, those of odd number values: NegPiP."""


class NormalizedGuidance(ExtraSpec, frozen=True):
    """What a UNet's self-attentions give for cond, guided away from what they give for uncond; its L1 norm grows `tau`-fold at most.

    Does nothing where one of the two is not evaluated. Source: normalized attention guidance (Chen et al. 2025, arXiv 2505.21179).

    Args:
        alpha: how much of that takes the place of what they give for cond.
    """

    scale: float
    alpha: float
    tau: float
    pairs = True


class NormalizedPrompt(ExtraSpec, Generic[T], frozen=True):
    """As `NormalizedGuidance`, of a UNet's attentions to the prompt: what cond's rows take is guided away from what they take of
    another prompt. Uncond's rows stay as they are, evaluated or not.

    Args:
        prompt: (1, tokens, context width), of which each of the places makes keys and values.
    """

    places: list[PlaceName]
    prompt: T
    scale: float
    alpha: float
    tau: float

    tensor_fields: ClassVar[tuple[str, ...]] = ("prompt",)


class NormalizedJointPrompt(ExtraSpec, Generic[T], frozen=True):
    """As `NormalizedPrompt`, of all joint attentions of an MMDiT: image tokens of cond's rows are guided away from what they would
    take beside the text tokens of another prompt, which go through the blocks beside them.

    Args:
        context, pooled: the other prompt, one row each, of as many tokens as the rows' prompts.
    """

    context: T
    pooled: T
    scale: float
    alpha: float
    tau: float

    tensor_fields: ClassVar[tuple[str, ...]] = ("context", "pooled")


class ReportScores(ExtraSpec, frozen=True):
    """How much each token is looked at in a UNet's self-attention: the report, of all tokens of the picture, is their softmax scores
    summed over queries, their mean over heads; of uncond's rows, zeros of others.

    Source: self-attention guidance (Hong et al. 2023, arXiv 2210.00939), section 4.2.
    """

    place: PlaceName
    reports = True


class TiledAttention(ExtraSpec, frozen=True):
    """Self-attentions of a UNet in tiles of queries, each of which looks at a strip of tokens: see extras/tiled_attention.py.

    Args:
        tiles: by place, tiles along both sides of the grid as which tokens are counted, and the grid's sides.
    """

    places: list[PlaceName]
    tiles: list[tuple[int, int, int, int]]


# Where FreeU acts on a UNet's image: on what input blocks give, on what the middle block gives, on what output blocks join.
FreeUSite: TypeAlias = Literal["input", "middle", "output"]


class FreeU(ExtraSpec, frozen=True):
    """Between blocks of a UNet, some of the image's channels are multiplied, and the lowest frequencies of skip connections.

    Source: FreeU (Si et al. 2023, arXiv 2309.11497), equations 3 to 5.

    Args:
        factors: by channels of the image where they act: (channels, of the image, of the skip connection).
        by_structure: the image's factor differs by cell, as the mean of its channels does there: the paper's second version.
        order: among what acts before output blocks.
        scaled: how many of the image's channels, the first ones, are multiplied, for each of `factors`; None: half of them.
        at: where; only output blocks join skip connections.
        cycles: frequencies of -cycles to cycles - 1 in each direction are the lowest ones.
    """

    factors: list[tuple[int, float, float]]
    by_structure: bool
    order: int = 0
    scaled: list[int] | None = None
    at: FreeUSite = "output"
    cycles: int = 1


class Downscale(ExtraSpec, frozen=True):
    """What an input block of a UNet gives is made smaller, and large again where a skip connection is.

    Source: Kohya's deep shrink, as ComfyUI's PatchModelAddDownscale has it.

    Args:
        factor: both sides are divided by it, and rounded.
        after_skip: the skip connection stays as large as it was.
        method, back: of resizing, and of resizing back: see `distributed/resize.py`.
        first: among what acts after input blocks. order: of the resizing back, as FreeU's.
        scales_residuals: a ControlNet's are added in the size of the picture within, bilinear; else not at all where sizes differ.
    """

    block: int
    factor: float
    after_skip: bool
    method: str
    back: str
    first: int = 0
    order: int = 0
    scales_residuals: bool = False

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """What a picture's sides become."""
        return round(height * (1.0 / self.factor)), round(width * (1.0 / self.factor))


class Rescale(ExtraSpec, frozen=True):
    """What input blocks of a UNet give is made smaller by whole multiples of some cells.

    Source: HiDiffusion (Zhang et al. 2023, arXiv 2311.17528), RAU-Net, as comfyui_jankhidiffusion has it.

    Args:
        factors: by which height and width are divided; below 1 they grow.
        unit: sides become multiples of it, or stay what they are.
        after_skip, first, scales_residuals: as `Downscale`'s.
        method: as `Downscale`'s; or "avg_pool2d", means of whole cells, so that sides come near to what is asked.
        round_up: whether of those cells a last part makes one, too.
        before, after: what values are multiplied by.
    """

    blocks: tuple[int, ...]
    factors: tuple[float, float]
    unit: float
    after_skip: bool
    method: str
    round_up: bool = True
    before: float = 1.0
    after: float = 1.0
    first: int = 0
    scales_residuals: bool = False

    def asked_sides(self, height: int, width: int) -> tuple[int, int]:
        """Those that are aimed at."""
        found = []
        for side, factor in zip((height, width), self.factors, strict=True):
            aimed = int(max(self.unit, ((side / self.unit) // factor) * self.unit))
            found.append(min(side, aimed) if factor >= 1 else max(side, aimed))
        return found[0], found[1]

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the cells whose means "avg_pool2d" takes."""
        rows, columns = self.asked_sides(height, width)
        return max(1, height // rows), max(1, width // columns)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """As `Downscale.sides`."""
        asked = self.asked_sides(height, width)
        if self.method != POOLED or asked == (height, width):
            return asked
        rows, columns = (
            -(-side // cell) if self.round_up else side // cell
            for side, cell in zip((height, width), self.cells(height, width), strict=True)
        )
        return rows, columns


class RescaleBack(ExtraSpec, frozen=True):
    """Before output blocks of a UNet, an image of another size than its skip connection is brought to that one's.

    Source, before, after: as `Rescale`'s. order: as FreeU's.
    """

    blocks: tuple[int, ...]
    method: str
    before: float = 1.0
    after: float = 1.0
    order: int = 0


class DownsampleByFour(ExtraSpec, frozen=True):
    """A downsampling of a UNet gives a quarter of both sides in place of half: its kernel's cells and steps are twice as far apart.

    Source, before, after, scales_residuals: as `Rescale`'s.

    Args:
        block: the input block that it is.
    """

    block: int
    before: float = 1.0
    after: float = 1.0
    scales_residuals: bool = False

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """As `Downscale.sides`."""
        return -(-height // 4), -(-width // 4)


class UpsampleBy(ExtraSpec, frozen=True):
    """An upsampling of a UNet, before its convolution, by another method than of nearest cells.

    Source, before, after: as `Rescale`'s.

    Args:
        block: the output block that ends in it.
        halfway: the method by which it first comes to half of the size; None: by one alone.
    """

    block: int
    method: str
    halfway: str | None = None
    before: float = 1.0
    after: float = 1.0


class ShiftedWindows(ExtraSpec, frozen=True):
    """Self-attentions of a UNet in two by two windows, which are shifted around the picture's edges: each token sees its window alone.

    Source: HiDiffusion (Zhang et al. 2023, arXiv 2311.17528), MSW-MSA, as comfyui_jankhidiffusion has it.

    Args:
        windows: by place, rows and columns as which tokens are counted, and by how many the windows are shifted down and right.
        method, back: of resizing tokens whose rows or columns are odd to the next even numbers, and their outputs back.
        gains: what tokens are multiplied by before that and after, and outputs before and after they are resized back.
    """

    places: list[PlaceName]
    windows: list[tuple[int, int, int, int]]
    method: str
    back: str
    gains: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)


# What an evaluation does with the outputs of its attention layers: computes them; keeps them, too; takes those that were kept; or takes
# the mean of these over the prompts that were evaluated together.
KeptForm: TypeAlias = Literal["computed", "kept", "taken", "taken_mean"]


class KeptAttention(ExtraSpec, frozen=True):
    """All attention layers of a UNet, whose outputs are kept from one evaluation of a sampling for later ones.

    Source: T-GATE (Zhang et al. 2024, arXiv 2404.02747), section 4.

    Args:
        sampling: a name of its own; what was kept under it is dropped by `Forget`, by which it is one of the keys.
    """

    sampling: str
    self_attention: KeptForm
    cross_attention: KeptForm
    pairs = True


# Of which prompt a row of an evaluation is (0 cond, 1 uncond), and which latent of its batch.
RowName: TypeAlias = tuple[int, int]


class SharedAttention(ExtraSpec, frozen=True):
    """Self-attentions of a UNet whose tokens look at those of another row as well; of StyleAligned, and of "reference only" nodes.

    Source: StyleAligned (Hertz et al. 2023, arXiv 2312.02133), section 4, equations 3 to 5.

    Args:
        rows: of the evaluation, all.
        sources: of each, the row whose values it has beside its own; that has itself.
        key_sources, key_weights: of each, the row whose keys it has beside its own, times a weight; one of the sources.
        matched: of what, "q", "k" and "v", the tokens are given their source's mean and standard deviation of each channel.
    """

    rows: list[RowName]
    sources: list[RowName]
    key_sources: list[RowName]
    key_weights: list[float]
    matched: list[Literal["q", "k", "v"]] = []
    pairs = True


class SharedNorms(ExtraSpec, frozen=True):
    """Group norms of a UNet by each row's pixels and those of another row together: StyleAligned's. Arguments as of `SharedAttention`."""

    rows: list[RowName]
    sources: list[RowName]
    pairs = True


AnyExtra: TypeAlias = (
    SkipBlocks
    | PerturbedAttention
    | JointImagePrompt[Any]
    | ImagePrompt[Any]
    | BlurQueries
    | SparseAttention
    | ShuffledTokens[Any]
    | RegionalPrompts[Any]
    | SplitPrompt
    | NormalizedGuidance
    | NormalizedPrompt[Any]
    | NormalizedJointPrompt[Any]
    | ReportScores
    | TiledAttention
    | FreeU
    | Downscale
    | Rescale
    | RescaleBack
    | DownsampleByFour
    | UpsampleBy
    | ShiftedWindows
    | KeptAttention
    | SharedAttention
    | SharedNorms
)  # fmt: skip
