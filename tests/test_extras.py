"""Extras, of whatever kind: in their places on every mesh, in both kinds of request, between their sigmas, in graphs; what doesn't fit is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_network import local_network
from rank_pool import RankPool, groups
from recordings import Recorder
from reference_models import diffusers_mmdit
from safetensors.torch import load_file
from served import EMPTY, NEGATIVE, POSITIVE
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel, StepCache
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.sites import UNetSites
from parallel_backend.distributed.stale import Step
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.free_u import WeighedSkips
from parallel_backend.extras.reading import Extras
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.extra import Extra, Row
from parallel_backend.models.families import SD3, SDXL, Kind
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import (
    AnyExtra,
    BlurQueries,
    Downscale,
    FreeU,
    ImagePrompt,
    LaterEvaluation,
    NormalizedGuidance,
    PerturbedAttention,
    RegionalPrompts,
    SkipBlocks,
    SplitPrompt,
    TiledAttention,
)
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

ROWS, SIZES = 3, [(16, 12), (13, 9)]
WHICH: tuple[Row, ...] = ((0, 0), (0, 1), (1, 0))
SKIPPED = SkipBlocks(blocks=[1, 3])
MIDDLE = ("middle", 0, 0)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(kind: Kind, size: tuple[int, int]) -> Rows:
    times = torch.tensor([900.0, 500.0, 20.0])
    if kind.name == "unet":  # a rank has a copy of it
        return Rows(seeded(ROWS, 4, *size, seed=5), times, Prompt(*unet_prompt(CONFIGS["tiny"], 1, 77, ROWS)))
    prompt = Prompt(POSITIVE.context.expand(ROWS, -1, -1), POSITIVE.pooled.expand(ROWS, -1))
    return Rows(seeded(ROWS, 16, *size, seed=5), times, prompt)


@cache
def predictor(path: Path, mesh: MeshSpec, kind: Kind) -> Predictor:
    built = build_mesh(mesh, groups())
    return Predictor(local_network(path, built), built, torch.float32, torch.device("cpu"), kind)


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, kind: Kind, size: tuple[int, int], asked: Sequence[AnyExtra]) -> Tensor:
    model = predictor(path, mesh, kind)
    return model.output(replace(rows_of(kind, size), extras=Extras().read(asked, [], model, size, (0, 1)), which=WHICH))


UNET_MESHES = [
    *(MeshSpec(patch=degree) for degree in (1, 2, 3)),
    *(MeshSpec(patch=2, sliced=True), MeshSpec(cfg=2), MeshSpec(dp=3), MeshSpec(cfg=2, patch=2)),
]
MMDIT_MESHES = [
    *(MeshSpec(), MeshSpec(ulysses=2), MeshSpec(ring=2), MeshSpec(tp=2), MeshSpec(pp=2), MeshSpec(cfg=2)),
    *(MeshSpec(ring=3), MeshSpec(ring=2, pp=2)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mesh", MMDIT_MESHES, ids=MeshSpec.describe)
def test_skipped_blocks_equal_diffusers(mesh: MeshSpec, size: tuple[int, int], ranks: RankPool, large: Path) -> None:
    expected = without_blocks(large, size)
    for out in ranks(mesh.world_size, output_case, large, mesh, SD3, size, [SKIPPED]):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@cache
def without_blocks(path: Path, size: tuple[int, int]) -> Tensor:
    """Of diffusers' model, on the latent padded to whole patches."""
    config: Any = predictor(path, MeshSpec(), SD3).network.config
    rows, (height, width) = rows_of(SD3, size), size
    x = torch.nn.functional.pad(rows.x, (0, width % 2, 0, height % 2), mode="circular")
    given = (x, rows.prompt.context, rows.prompt.pooled, rows.timesteps)
    with torch.inference_mode():
        model = diffusers_mmdit(config, load_file(path))
        out = model(*given, skip_layers=SKIPPED.blocks, return_dict=False)[0]
    return out[:, :, :height, :width]


class IdentityProcessor:
    """diffusers' self-attention whose tokens see themselves alone."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return attn.to_out[0](attn.to_v(hidden_states))


@cache
def perturbed(size: tuple[int, int]) -> Tensor:
    model, rows = random_unet(CONFIGS["tiny"]), rows_of(SDXL, size)
    attention_places(model)[MIDDLE].attn1.processor = IdentityProcessor()  # type: ignore[assignment]
    with torch.inference_mode():
        return model(rows.x, rows.timesteps, rows.prompt.context, class_labels=rows.prompt.pooled).sample


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mesh", UNET_MESHES, ids=MeshSpec.describe)
def test_perturbed_attention_equals_diffusers(
    mesh: MeshSpec, size: tuple[int, int], ranks: RankPool, unets: Path
) -> None:
    expected, asked = perturbed(size), [PerturbedAttention(places=[MIDDLE])]
    for out in ranks(mesh.world_size, output_case, unets / "unet-tiny.safetensors", mesh, SDXL, size, asked):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@dataclass(frozen=True, kw_only=True)
class ByRow(Extra):
    """Of a test: it remembers for which rows it was asked."""

    seen: tuple[Any, ...] = ()

    def _chosen(self, rows: Sequence[Row]) -> ByRow:
        return replace(self, seen=tuple(rows))

    def on_unet(self, sites: Any) -> None:
        SEEN.append(self.seen)


SEEN: list[tuple[Any, ...]] = []


@torch.inference_mode()
def rows_case(path: Path, mesh: MeshSpec, whole_loop: bool) -> list[tuple[Any, ...]]:
    """The rows that each evaluation of this rank was of."""
    SEEN.clear()
    model, rows = predictor(path, mesh, SDXL), rows_of(SDXL, (16, 12))
    if whole_loop:
        prompts = [replace(rows.prompt), Prompt(*unet_prompt(CONFIGS["tiny"], 2, 77, ROWS))]
        share = model.share(ROWS, prompts, [ByRow()])
        model.outputs(rows.x, torch.tensor(500.0), share, Step())
    else:
        model.output(replace(rows, extras=[ByRow()], which=WHICH))
    return list(SEEN)


def test_each_rank_is_told_which_rows_it_has(ranks: RankPool, unets: Path) -> None:
    path, first, second = unets / "unet-tiny.safetensors", [(0, i) for i in range(3)], [(1, i) for i in range(3)]
    assert ranks(2, rows_case, path, MeshSpec(cfg=2), False) == [[((0, 0), (0, 1))], [((1, 0),)]]
    assert ranks(2, rows_case, path, MeshSpec(cfg=2), True) == [[tuple(first)], [tuple(second)]]
    halves = [[(*first[:2], *second[:2])], [(*first[2:], *second[2:])]]
    assert ranks(2, rows_case, path, MeshSpec(dp=2), True) == halves


def test_an_extra_makes_another_recording_and_is_done_again_by_it(large: Path) -> None:
    plain = predictor(large, MeshSpec(), SD3)
    model, recorder = replace(plain), Recorder()
    model.captured = CapturedNetwork(plain.network, plain.mesh, recorder)
    asked = [[], [SKIPPED], [SkipBlocks(blocks=[2])]]
    with torch.inference_mode():
        extras = [Extras().read(given, [], plain, (16, 12), (0, 1)) for given in asked]
        rows = [replace(rows_of(SD3, (16, 12)), extras=given, which=WHICH) for given in extras]
        expected = [plain.output(given) for given in rows]
        for _ in range(3):
            for given, wanted in zip(rows, expected, strict=True):
                assert torch.equal(model.output(given), wanted)
    assert not torch.equal(expected[1], expected[2])
    assert (recorder.evaluated, recorder.recorded_ones, recorder.done_again) == (3, 3, 6)


def sampled(model: RemoteModel, *extras: AnyExtra, **settings: Any) -> Tensor:
    return model.sample(EMPTY, POSITIVE, NEGATIVE, steps=3, extras=extras, **settings)


def test_a_sampling_heeds_an_extra_between_its_sigmas(model: RemoteModel) -> None:
    without, everywhere = sampled(model), sampled(model, SKIPPED)
    # The sigmas of three steps of SD3's schedule are 1, 0.857, 0.6.
    at_first, later = (
        sampled(model, SkipBlocks(blocks=[1, 3], end=0.9)),
        sampled(model, SkipBlocks(blocks=[1, 3], start=0.9)),
    )
    assert torch.equal(sampled(model, SkipBlocks(blocks=[1, 3], start=0.5)), without)
    found = [without, everywhere, at_first, later]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


def test_one_evaluation_and_a_whole_sampling_give_the_same(model: RemoteModel) -> None:
    x = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(3))
    given = (x, torch.tensor([1000.0]), POSITIVE.context, POSITIVE.pooled)
    velocity = model.forward(*given, extras=[SKIPPED])
    one_step = model.sample(
        torch.zeros_like(x), POSITIVE, None, noise=x, sigmas=torch.tensor([1.0, 0.0]), extras=[SKIPPED]
    )
    expected = (x - velocity) / 1.5305 + 0.0609  # in the VAE's scale
    assert (one_step - expected).abs().max() < 1e-4
    assert (model.forward(*given) - velocity).abs().max() > 1e-3


def test_one_evaluation_heeds_an_extra_between_its_sigmas(model: RemoteModel) -> None:
    x = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(3))
    given = (x, torch.tensor([500.0]), POSITIVE.context, POSITIVE.pooled)
    without, everywhere = model.forward(*given), model.forward(*given, extras=[SKIPPED])
    early = [SkipBlocks(blocks=[1, 3], end=0.9)]
    assert torch.equal(model.forward(*given, extras=early, sigma=0.95), everywhere)
    assert torch.equal(model.forward(*given, extras=early, sigma=0.5), without)
    assert torch.equal(model.forward(*given, extras=early), everywhere)
    with pytest.raises(InputError, match="Joint block 99 is named"):
        model.forward(*given, extras=[SkipBlocks(blocks=[99], end=0.9)], sigma=0.5)
    with pytest.raises(InputError, match="Sigma nan is not finite"):
        model.forward(*given, extras=early, sigma=float("nan"))


WRONG: list[tuple[AnyExtra, type[Exception], str]] = [
    (SkipBlocks(blocks=[1, 99]), InputError, "Joint block 99 is named; this sd3.5-large has none of that number"),
    (SkipBlocks(blocks=[-1]), InputError, "Joint block -1 is named"),
    (SkipBlocks(blocks=[1], start=0.1, end=0.9), InputError, "acts from sigma 0.1 to 0.9"),
    (
        PerturbedAttention(places=[MIDDLE]),
        UnsupportedError,
        "PerturbedAttention acts inside a UNet; this model is a sd3.5-large",
    ),
]


@pytest.mark.parametrize(("extra", "kind", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_named_before_the_first_step(
    extra: AnyExtra, kind: type[Exception], words: str, model: RemoteModel, expected: Tensor
) -> None:
    steps: list[Any] = []
    with pytest.raises(kind, match=words):
        sampled(model, extra, on_step=steps.append)
    assert not steps


def test_what_a_later_evaluation_can_not_have_is_named_at_the_first(model: RemoteModel) -> None:
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    given = (x, torch.tensor([1000.0]), POSITIVE.context, POSITIVE.pooled)
    assert torch.equal(model.forward(*given, later=[LaterEvaluation([SKIPPED], [0])]), model.forward(*given))
    with pytest.raises(InputError, match="Joint block 99 is named"):
        model.forward(*given, later=[LaterEvaluation([SKIPPED], [0]), LaterEvaluation([SkipBlocks(blocks=[99])], [0])])


def test_rows_that_cannot_be_shared_out_among_branches_are_named(model: RemoteModel) -> None:
    x, times = torch.zeros(3, 16, 8, 8), torch.ones(3)
    with pytest.raises(InputError, match="3 rows came for 2 branches"):
        model.forward(x, times, POSITIVE.context, POSITIVE.pooled, extras=[SKIPPED], branches=[0, 1])


def test_an_unknown_place_of_a_unet_is_named(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")
    context, pooled = unet_prompt(CONFIGS["tiny"], 1, 77, 1)
    with pytest.raises(InputError, match="Transformer block input 99 0 is named"):
        model.forward(
            torch.zeros(1, 4, 8, 8),
            torch.ones(1),
            context,
            pooled,
            extras=[PerturbedAttention(places=[("input", 99, 0)])],
        )


def test_what_knows_tokens_by_their_place_is_refused_beside_a_smaller_picture(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")
    context, pooled = unet_prompt(CONFIGS["tiny"], 1, 77, 1)
    shrink = Downscale(block=2, factor=2.0, after_skip=True, method="bilinear", back="bilinear", end=5.0)
    tiled = TiledAttention(places=[MIDDLE], tiles=[(2, 1, 4, 3)])
    later = TiledAttention(places=[MIDDLE], tiles=[(2, 1, 4, 3)], start=4.0)
    given = torch.zeros(1, 4, 16, 12), torch.ones(1), context, pooled
    with pytest.raises(UnsupportedError, match="HyperTile can't be honoured beside deep shrink"):
        model.forward(*given, extras=[tiled, shrink], sigma=1.0)
    with pytest.raises(UnsupportedError, match="HyperTile can't be honoured beside deep shrink"):
        model.forward(*given, extras=[shrink], sigma=9.0, later=[LaterEvaluation([tiled, shrink], [0])])
    for sigma, acting in ((9.0, shrink), (1.0, later)):
        assert torch.equal(
            model.forward(*given, extras=[later, shrink], sigma=sigma), model.forward(*given, extras=[acting])
        )


def test_a_step_cache_decides_by_the_calls_that_are_made(backend2: Backend, large: Path) -> None:
    """Prompts of one length, of which one has an extra of its own, are two calls."""
    model = backend2.load_model(large, MeshSpec(tp=2), "float32")
    cache = StepCache("first_block", threshold=0.0)
    one = {"steps": 3, "uncond_extras": [SKIPPED]}
    prompts = (POSITIVE, Conditioning(NEGATIVE.context.repeat(1, 2, 1), NEGATIVE.pooled))
    assert prompts[0].context.shape == prompts[1].context.shape
    exact, cached = (model.sample(EMPTY, *prompts, step_cache=asked, **one) for asked in (None, cache))
    assert torch.equal(exact, cached)


def test_a_skipped_attention_that_comes_back_is_refused_beside_displaced_steps(backend2: Backend, large: Path) -> None:
    model = backend2.load_model(large, MeshSpec(ring=2), "float32")
    with pytest.raises(UnsupportedError, match="Displaced steps can't honour skipped blocks"):
        sampled(model, SkipBlocks(blocks=[1], end=0.5), warmup_steps=1)
    assert torch.isfinite(sampled(model, SKIPPED, warmup_steps=1)).all()


def test_sizes_are_looked_at_in_each_branch(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")
    prompt = Conditioning(*unet_prompt(CONFIGS["tiny"], 1, 77, 1))
    shrink = Downscale(block=2, factor=2.0, after_skip=True, method="bilinear", back="bilinear")
    tiled = TiledAttention(places=[MIDDLE], tiles=[(2, 1, 4, 3)])
    with pytest.raises(UnsupportedError, match="HyperTile can't be honoured beside deep shrink"):
        model.sample(torch.zeros(1, 4, 16, 12), prompt, prompt, steps=2, extras=[shrink], uncond_extras=[tiled])
    with pytest.raises(InputError, match="A prompt of 77 tokens can't be half keys"):
        model.sample(torch.zeros(1, 4, 16, 12), prompt, steps=2, extras=[SplitPrompt()])


def test_all_that_acts_before_output_blocks_does() -> None:
    sites = UNetSites()
    for _ in range(2):
        weighed = {"by_structure": False, "order": 0, "site": "output", "cycles": 1, "inputs": 6}
        WeighedSkips(factors=((4, 2, 1.0, 1.0),), **weighed).on_unet(sites)
    assert len(sites.before_output) == 2


@pytest.mark.parametrize(
    "extra",
    [
        Downscale(block=2, factor=1e-3, after_skip=True, method="bilinear", back="bilinear"),
        BlurQueries(places=[MIDDLE], blur=float("inf")),
        NormalizedGuidance(scale=float("nan"), alpha=0.5, tau=1.5),
        NormalizedGuidance(scale=5.0, alpha=0.5, tau=-1.0),
        FreeU(factors=[(128, float("inf"), 1.0)], by_structure=False),
        TiledAttention(places=[MIDDLE], tiles=[(-1, -1, -4, -3)]),
        ImagePrompt(places=[MIDDLE], tokens=[0], rows=[(0, None)], keys_values=torch.zeros(1, 0)),
        RegionalPrompts(strength=0.5, keys=[], values=None, masks=[]),
    ],
    ids=lambda extra: type(extra).__name__,
)
def test_numbers_that_no_node_gives_are_named(extra: AnyExtra, backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")
    context, pooled = unet_prompt(CONFIGS["tiny"], 1, 77, 1)
    with pytest.raises(InputError):
        model.forward(torch.zeros(1, 4, 16, 12), torch.ones(1), context, pooled, extras=[extra])
