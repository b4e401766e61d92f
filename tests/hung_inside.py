"""Each extra that hangs inside a model, made for whatever model and size: for those that try all of them on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from msgspec import structs

from parallel_backend.extras.target import Target
from parallel_backend.models.unet import BandUNet
from parallel_backend.rpc.extras import (
    AnyExtra,
    BlurQueries,
    DownsampleByFour,
    Downscale,
    FreeU,
    ImagePrompt,
    JointImagePrompt,
    KeptAttention,
    NormalizedGuidance,
    NormalizedJointPrompt,
    NormalizedPrompt,
    PerturbedAttention,
    RegionalPrompts,
    ReportScores,
    Rescale,
    RescaleBack,
    SharedAttention,
    SharedNorms,
    ShiftedWindows,
    ShuffledTokens,
    SkipBlocks,
    SparseAttention,
    SplitPrompt,
    TiledAttention,
    UpsampleBy,
)

# Evaluations are of two latents with guidance, and of prompts of so many tokens.
LATENTS, TOKENS = 2, 78
ROWS = [(branch, latent) for branch in (0, 1) for latent in range(LATENTS)]
NAG = {"scale": 3.0, "alpha": 0.5, "tau": 2.5}
# What hangs inside, of a model as this rank has it.
Make = Callable[[Target], Sequence[AnyExtra]]


def places(target: Target) -> list[Any]:
    assert isinstance(target.predictor.network, BandUNet)
    return sorted(target.predictor.network.places)


def cells(target: Target, place: Any) -> int:
    rows, columns = target.sides_at(place)
    return rows * columns


def downsampling(target: Target) -> int:
    """The first input block that halves the picture."""
    return int(target.config.layers_per_block) + 1


def upsampling(target: Target) -> int:
    """The first output block that ends in the picture's doubling."""
    return int(target.config.layers_per_block)


def outputs(target: Target) -> int:
    return len(target.config.block_channels) * (int(target.config.layers_per_block) + 1)


def image_prompt(target: Target, **more: Any) -> list[AnyExtra]:
    """Of both prompts, with a mask."""
    network: Any = target.predictor.network
    known = places(target)
    values = sum(2 * network.places[place].attn2.inner_dim * 4 for place in known)
    masks = torch.rand(2, sum(cells(target, place) for place in known))
    rows: Any = [(0, None), (1, None)]
    tensors = {"keys_values": torch.randn(2, values), "masks": masks}
    return [ImagePrompt(places=known, tokens=[4] * len(known), rows=rows, **tensors, **more)]


def regions(target: Target, *, split: bool = False) -> RegionalPrompts[torch.Tensor]:
    masks = [torch.full((2, count), 0.5) for count in {cells(target, place) for place in places(target)}]
    other = torch.randn(1, TOKENS, target.config.context_width)
    return RegionalPrompts(strength=0.9, keys=[other], values=[other] if split else None, masks=masks)


def windows(target: Target) -> list[AnyExtra]:
    sides = [(*target.sides_at(place), 1, 2) for place in places(target)]
    return [ShiftedWindows(places=places(target), windows=sides, method="nearest-exact", back="nearest-exact")]


def tiles(target: Target) -> list[AnyExtra]:
    return [TiledAttention(places=places(target), tiles=[(2, 2, *target.sides_at(place)) for place in places(target)])]


def shuffled(target: Target) -> list[AnyExtra]:
    return [ShuffledTokens(places=[place], orders=torch.randperm(cells(target, place))) for place in places(target)]


def shared(target: Target) -> list[AnyExtra]:
    sources: Any = [(branch, 0) for branch, _ in ROWS]
    weights: Any = {"key_sources": sources, "key_weights": [1.0, 0.5, 1.0, 1.0], "matched": ["q", "k"]}
    return [SharedAttention(rows=ROWS, sources=sources, **weights)]


def free_u(target: Target) -> list[AnyExtra]:
    factors = [(channels, 1.2, 0.4) for channels in target.config.block_channels[-2:]]
    return [FreeU(factors=factors, by_structure=by, order=by) for by in (False, True)]


def joint_prompt(target: Target) -> list[AnyExtra]:
    blocks, heads = list(range(target.config.depth)), target.config.heads
    tensors = {
        "norms": [torch.rand(3, 64) for _ in blocks],
        "matrices": [torch.randn(2, heads * 64, 96) for _ in blocks],
        "tokens": {branch: torch.randn(1, 1, 8, 96) for branch in (0, 1)},
        "modulation": {branch: torch.randn(1, 1, len(blocks), 2, 96) for branch in (0, 1)},
    }
    return [JointImagePrompt(blocks=blocks, weight=0.7, **tensors)]


def joint_negative(target: Target) -> list[AnyExtra]:
    context, pooled = (
        torch.randn(1, *size) for size in ((TOKENS, target.config.context_width), (target.config.pooled_width,))
    )
    return [NormalizedJointPrompt(context=context, pooled=pooled, **NAG)]


# Some stand together that act in other places of a block: each evaluation takes a second.
OF_UNETS: dict[str, Make] = {
    "PAG, deep shrink": lambda target: [
        PerturbedAttention(places=places(target)[:1]),
        Downscale(block=1, factor=2.0, after_skip=True, method="bicubic", back="bicubic", scales_residuals=True),
    ],
    "SEG, PLADIS, shared norms": lambda target: [
        BlurQueries(places=places(target)[:1], blur=1.5),
        BlurQueries(places=places(target)[1:], blur=None),
        SparseAttention(places=places(target), scale=2.0, sparse="entmax1.5"),
        SharedNorms(rows=ROWS, sources=[(branch, 0) for branch, _ in ROWS]),
    ],
    "SAG, PLADIS by sparsemax, FreeU": lambda target: [
        ReportScores(place=places(target)[1]),
        SparseAttention(places=places(target), scale=1.5, sparse="sparsemax"),
        *free_u(target),
    ],
    "TPG, NAG": lambda target: [
        *shuffled(target),
        NormalizedPrompt(places=places(target), prompt=torch.randn(1, 50, target.config.context_width), **NAG),
    ],
    "core's NAG, an image prompt": lambda target: [NormalizedGuidance(**NAG), *image_prompt(target)],
    "HyperTile, an orthogonal image prompt": lambda target: [*tiles(target), *image_prompt(target, form="orthogonal")],
    "StyleAligned, a partly orthogonal image prompt": lambda target: [
        *shared(target), *image_prompt(target, form="partly_orthogonal")
    ],
    "MSW-MSA, NegPiP": lambda target: [*windows(target), SplitPrompt()],
    "T-Gate": lambda target: [KeptAttention(sampling="a", self_attention="kept", cross_attention="kept")],
    "regional prompts of NegPiP": lambda target: [regions(target, split=True)],
    "regional prompts, an image prompt": lambda target: [regions(target), *image_prompt(target, regions=[0])],
    "RAUNet": lambda target: [
        Rescale(blocks=(1,), factors=(2.0, 2.0), unit=8, after_skip=False, method="avg_pool2d"),
        RescaleBack(blocks=tuple(range(1, outputs(target))), method="bilinear"),
    ],
    "HiDiffusion's ends": lambda target: [
        DownsampleByFour(block=downsampling(target)),
        UpsampleBy(block=upsampling(target), method="bicubic", halfway="nearest-exact"),
    ],
}  # fmt: skip

OF_MMDITS: dict[str, Make] = {
    "skipped blocks": lambda target: [SkipBlocks(blocks=[1])],
    "image prompt": joint_prompt,
    "NAG": joint_negative,
    "NAG, skipped blocks, an image prompt": lambda target: [
        *joint_negative(target), SkipBlocks(blocks=[0]), *joint_prompt(target)
    ],
}  # fmt: skip


def later(specs: Sequence[AnyExtra]) -> list[AnyExtra]:
    """What the evaluation after that has in place of these: outputs that were kept are taken."""
    taken: Any = {"self_attention": "taken_mean", "cross_attention": "taken_mean"}
    return [structs.replace(spec, **taken) if isinstance(spec, KeptAttention) else spec for spec in specs]
