"""What hangs inside models, on the CUDA path without CUDA: no operation mixes devices, and no evaluation after the first waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from fake_cuda.device import DEVICE, fake_cuda
from fake_cuda.networks import Config, Evaluations, medium, predictor, shallow_sdxl
from fake_cuda.watch import HostSyncError, MixedDevicesError, Watch

from parallel_backend.config import MeshSpec
from parallel_backend.extras.reading import _KINDS, read_extra
from parallel_backend.extras.target import Target
from parallel_backend.models.prediction import Predictor
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


def named(value: object) -> str | None:
    return value.describe() if isinstance(value, MeshSpec) else None


SIZE = (64, 96)
LATENTS, TOKENS = 2, 78
ROWS = [(branch, latent) for branch in (0, 1) for latent in range(LATENTS)]
NAG = {"scale": 3.0, "alpha": 0.5, "tau": 2.5}
MMDIT_MESHES = [
    (MeshSpec(), 0),
    (MeshSpec(cfg=2), 1),
    (MeshSpec(ring=2), 1),
    (MeshSpec(ulysses=2), 0),
    (MeshSpec(tp=2), 1),
]
# What hangs inside, of a model as this rank has it.
Make = Callable[[Target], Sequence[AnyExtra]]


def places(target: Target) -> list[Any]:
    assert isinstance(target.predictor.network, BandUNet)
    return sorted(target.predictor.network.places)


def cells(target: Target, place: Any) -> int:
    rows, columns = target.sides_at(place)
    return rows * columns


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
    other = torch.randn(1, TOKENS, 2048)
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
    return [FreeU(factors=[(640, 1.2, 0.9), (320, 1.3, 0.4)], by_structure=by, order=by) for by in (False, True)]


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
    context, pooled = torch.randn(1, TOKENS, 4096), torch.randn(1, 2048)
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
        NormalizedPrompt(places=places(target), prompt=torch.randn(1, 50, 2048), **NAG),
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
        RescaleBack(blocks=(1, 2, 3), method="bilinear"),
    ],
    "HiDiffusion's ends": lambda target: [
        DownsampleByFour(block=2),
        UpsampleBy(block=1, method="bicubic", halfway="nearest-exact"),
        RescaleBack(blocks=(2, 3), method="bilinear"),
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


def run(of: Predictor, make: Make) -> None:
    target = Target(of, *SIZE)
    extras = tuple(read_extra(spec, target) for spec in make(target))
    evaluations = Evaluations(of, (SIZE[0] * 8, SIZE[1] * 8), tokens=(TOKENS, TOKENS), rows=LATENTS)
    share = of.share(LATENTS, evaluations.prompts, extras)
    evaluations.next(share=share)  # after which what differs by row is on the device
    with Watch() as watch:
        out = evaluations.next(share=share)
    assert [x.shape for x in out] == [evaluations.shape] * 2 and out[0].device == DEVICE and watch.launches.total()


def faults(config: Config, mesh: MeshSpec, rank: int, cases: Mapping[str, Make]) -> dict[str, str]:
    """By case, what is wrong."""
    found = {}
    with fake_cuda(rank, mesh.world_size), torch.inference_mode():
        of = predictor(config, mesh)
        for case, make in cases.items():
            try:
                run(of, make)
            except (MixedDevicesError, HostSyncError) as error:
                found[case] = str(error)
    return found


def test_a_unets_evaluations_with_each_stay_on_their_device() -> None:
    assert not faults(shallow_sdxl(), MeshSpec(cfg=2, patch=2), 3, OF_UNETS)


@pytest.mark.parametrize(("mesh", "rank"), MMDIT_MESHES, ids=named)
def test_a_transformers_evaluations_with_each_stay_on_their_device(mesh: MeshSpec, rank: int) -> None:
    assert not faults(medium(2, dual=1), mesh, rank, OF_MMDITS)


@pytest.mark.parametrize("form", ["taken", "taken_mean"])
def test_outputs_that_were_kept_are_taken_on_their_device(form: Literal["taken", "taken_mean"]) -> None:
    with fake_cuda(3, 4), torch.inference_mode():
        of = predictor(shallow_sdxl(), MeshSpec(cfg=2, patch=2))
        target, launches = Target(of, *SIZE), []
        for asked in ("kept", form):
            gated = read_extra(KeptAttention(sampling="a", self_attention=asked, cross_attention=asked), target)
            evaluations = Evaluations(of, (SIZE[0] * 8, SIZE[1] * 8), tokens=(TOKENS, TOKENS), rows=LATENTS)
            share = of.share(LATENTS, evaluations.prompts, [gated])
            with Watch() as watch:
                evaluations.next(share=share)
            launches.append(watch.launches.total())
    assert launches[1] < launches[0]


def test_every_kind_is_among_them() -> None:
    with fake_cuda():
        targets = [Target(predictor(config, MeshSpec()), *SIZE) for config in (shallow_sdxl(), medium(2, dual=1))]
        made = [
            type(spec) for target, cases in zip(targets, (OF_UNETS, OF_MMDITS), strict=True)
            for make in cases.values() for spec in make(target)
        ]  # fmt: skip
    assert set(made) == _KINDS.keys()
