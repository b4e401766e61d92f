"""Extras of requests that change attentions: which are computed, on which tokens and rows, and what is kept of them."""

from __future__ import annotations

from typing import ClassVar, Generic, Literal, TypeAlias

import msgspec

from .spec import ExtraSpec, PlaceName, T


class SkipBlocks(ExtraSpec, frozen=True):
    """These joint blocks of an MMDiT hand text and image tokens on as they came: skip-layer guidance's weaker model."""

    blocks: list[int]


class PerturbedAttention(ExtraSpec, frozen=True):
    """Self-attentions of a UNet in which each token sees itself alone.

    Source: perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377), section 4.
    """

    places: list[PlaceName]


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
    matched: list[Literal["q", "k", "v"]] = msgspec.field(default_factory=list)
    pairs = True


class SharedNorms(ExtraSpec, frozen=True):
    """Group norms of a UNet by each row's pixels and those of another row together: StyleAligned's. Arguments as of `SharedAttention`."""

    rows: list[RowName]
    sources: list[RowName]
    pairs = True
