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

    Source: InstantX's IP-Adapter for SD3.5.

    Args:
        norms: (blocks, 2, H), weights of further RMS norms of the image's queries and keys, after the block's own.
        keys_values: by branch, (rows, blocks, T, 2, N, H), rows 1 or as many as latents; they change with the timestep.
        weight: what the result is multiplied by.
    """

    blocks: list[int]
    norms: T
    keys_values: dict[int, T]
    weight: float = 1.0

    tensor_fields: ClassVar[tuple[str, ...]] = ("norms", "keys_values")
    fresh_fields: ClassVar[tuple[str, ...]] = ("keys_values",)


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
    Source: IP-Adapter (Ye et al. 2023, arXiv 2308.06721), equation 5.
    """

    places: list[PlaceName]
    tokens: list[int]
    rows: list[tuple[int, int | None]]
    keys_values: T
    masks: T | None = None
    form: ImagePromptForm = "added"

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
        order: of the resizing back, as FreeU's.
    """

    block: int
    factor: float
    after_skip: bool
    method: str
    back: str
    order: int = 0


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
    | ReportScores
    | TiledAttention
    | FreeU
    | Downscale
)  # fmt: skip
