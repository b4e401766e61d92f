"""What extras do at self-attentions of a UNet, on bands and on rows of several ranks, against plain formulas in diffusers' model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPool
from recordings import Recorder
from test_extras import MIDDLE, SDXL, predictor, seeded
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import Backend, MeshSpec
from parallel_backend.distributed.stale import Step
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.reading import Extras
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.extra import Row
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.conditioning import Conditioning
from parallel_backend.rpc.extras import AnyExtra, BlurQueries, NormalizedGuidance, ReportScores, TiledAttention
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

FINE, COARSE = ("input", 3, 0), ("output", 1, 1)  # of half and of a quarter of the latent's sides
FILE = "unet-tiny.safetensors"
# As ComfyUI's sampling has them: uncond first, two latents each.
WHICH: tuple[Row, ...] = ((1, 0), (1, 1), (0, 0), (0, 1))
BANDS = [MeshSpec(patch=degree) for degree in (1, 2, 3)]
Formula = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def rows_of(size: tuple[int, int], which: Sequence[Row] = WHICH) -> Rows:
    count = len(which)
    prompt = Prompt(*unet_prompt(CONFIGS["tiny"], 1, 77, count))
    return Rows(seeded(count, 4, *size, seed=5), torch.linspace(900, 20, count), prompt, which=tuple(which))


@torch.inference_mode()
def results_case(
    path: Path, mesh: MeshSpec, size: tuple[int, int], asked: Sequence[AnyExtra], which: Sequence[Row] = WHICH
) -> list[Tensor]:
    model = predictor(path, mesh, SDXL)
    rows, extras = rows_of(size, which), Extras().read(asked, [], model, size, (0, 1))
    given = (rows.x, rows.timesteps, rows.prompt, rows.residuals, extras, rows.which)
    return [x.clone() for x in model.output_and_reports(Rows(*given))]


class AsFormula:
    """diffusers' self-attention with a formula between its projections, and one after them."""

    def __init__(self, between: Formula, after: Callable[[Tensor], Tensor]) -> None:
        self.between, self.after = between, after

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        qkv = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        return self.after(attn.to_out[0](self.between(*qkv, attn.heads)))


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    parts = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def expected(
    size: tuple[int, int],
    places: Sequence[Any],
    between: Formula = attended,
    after: Callable[[Tensor], Tensor] = lambda out: out,
    which: Sequence[Row] = WHICH,
) -> Tensor:
    model, rows = random_unet(CONFIGS["tiny"]), rows_of(size, which)
    for place, block in attention_places(model).items():
        if place in places or not places:
            block.attn1.processor = AsFormula(between, after)  # type: ignore[assignment]
    with torch.inference_mode():
        return model(rows.x, rows.timesteps, rows.prompt.context, class_labels=rows.prompt.pooled).sample


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def blurred(rows: int, taps: int, blur: float, q: Tensor, *rest: Any) -> Tensor:
    """By one kernel of both sides, on the picture."""
    positions = torch.arange(taps) - taps // 2
    weights = torch.exp(-(positions**2) / (2 * blur**2))
    kernel = (weights[:, None] * weights[None, :]) / weights.sum() ** 2
    image = q.transpose(1, 2).unflatten(2, (rows, -1)).flatten(0, 1).unsqueeze(1)
    image = F.conv2d(F.pad(image, [taps // 2] * 4, mode="reflect"), kernel[None, None])
    return attended(image.squeeze(1).flatten(1).view(q.shape[0], q.shape[2], -1).transpose(1, 2), *rest)


def mean(q: Tensor, *rest: Any) -> Tensor:
    return attended(q.mean(1, keepdim=True).expand_as(q), *rest)


@cache
def smoothed(size: tuple[int, int], blur: float | None) -> Tensor:
    taps = 0 if blur is None else {0.5: 3, 1.1: 7}[blur]
    rows = {(16, 12): 8, (20, 20): 10, (42, 26): 21}[size]
    return expected(size, [FINE], mean if blur is None else partial(blurred, rows, taps, blur))


@pytest.mark.parametrize(("size", "blur"), [((20, 20), 1.1), ((16, 12), 0.5), ((42, 26), None)], ids=str)
@pytest.mark.parametrize("mesh", BANDS, ids=MeshSpec.describe)
def test_blurred_queries(
    mesh: MeshSpec, size: tuple[int, int], blur: float | None, ranks: RankPool, unets: Path
) -> None:
    asked = [BlurQueries(places=[FINE], blur=blur)]
    for (out,) in ranks(mesh.world_size, results_case, unets / FILE, mesh, size, asked):
        assert_alike(out, smoothed(size, blur))


def tiled(nh: int, nw: int, h: int, w: int, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Queries by reordering them, keys and values by the batch that they are taken as."""
    B, _, D = q.shape
    grid = (B, nh, h // nh, nw, w // nw, D)
    of_tiles = q.reshape(grid).transpose(2, 3).reshape(B * nh * nw, -1, D)
    out = attended(of_tiles, *(x.reshape(B * nh * nw, -1, D) for x in (k, v)), heads)
    return out.reshape(B, nh, nw, h // nh, w // nw, D).transpose(2, 3).reshape(B, -1, D)


@pytest.mark.parametrize(
    ("size", "place", "tiling"),
    [
        *(((16, 12), FINE, (3, 2, 6, 8)), ((21, 13), FINE, (11, 1, 11, 7)), ((21, 13), COARSE, (2, 3, 4, 6))),
    ],
    ids=str,
)
@pytest.mark.parametrize("mesh", BANDS, ids=MeshSpec.describe)
def test_tiles_of_queries(
    mesh: MeshSpec, size: tuple[int, int], place: Any, tiling: Any, ranks: RankPool, unets: Path
) -> None:
    asked = [TiledAttention(places=[place], tiles=[tiling])]
    wanted = expected(size, [place], partial(tiled, *tiling))
    for (out,) in ranks(mesh.world_size, results_case, unets / FILE, mesh, size, asked):
        assert_alike(out, wanted)


ROW_MESHES = [
    *(MeshSpec(), MeshSpec(patch=2), MeshSpec(patch=3), MeshSpec(cfg=2), MeshSpec(dp=2), MeshSpec(dp=3)),
    *(MeshSpec(cfg=2, dp=2), MeshSpec(cfg=2, patch=2), MeshSpec(patch=2, sliced=True)),
]


@pytest.mark.parametrize("mesh", ROW_MESHES, ids=MeshSpec.describe)
def test_scores_come_back_of_unconds_rows(mesh: MeshSpec, ranks: RankPool, unets: Path) -> None:
    size, kept = (21, 13), list[Tensor]()

    def recording(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        qs, ks = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        kept.append((qs @ ks.mT / qs.shape[-1] ** 0.5).softmax(-1).mean(1).sum(1))
        return attended(q, k, v, heads)

    wanted = expected(size, [MIDDLE], recording)
    scores = torch.cat([kept[0][:2], torch.zeros_like(kept[0][2:])])
    for out, report in ranks(mesh.world_size, results_case, unets / FILE, mesh, size, [ReportScores(place=MIDDLE)]):
        assert_alike(out, wanted)
        assert_alike(report, scores)


def guided(which: Sequence[Row], out: Tensor) -> Tensor:
    scale, alpha, tau = 4.0, 0.5, 1.5
    changed = out.clone()
    for number, (branch, latent) in enumerate(which):
        if branch == 0 and (1, latent) in which:
            cond, uncond = out[number], out[which.index((1, latent))]
            away = scale * cond - (scale - 1) * uncond
            ratio = away.abs().sum(-1, keepdim=True) / cond.abs().sum(-1, keepdim=True)
            away = torch.where(ratio > tau, away * tau / ratio, away)
            changed[number] = alpha * away + (1 - alpha) * cond
    return changed


NAG = NormalizedGuidance(scale=4.0, alpha=0.5, tau=1.5)
ONE_OF_EACH: tuple[Row, ...] = ((0, 0), (1, 0))


@pytest.mark.parametrize("which", [WHICH, ONE_OF_EACH, ((0, 0), (0, 1))], ids=str)
@pytest.mark.parametrize("mesh", ROW_MESHES, ids=MeshSpec.describe)
def test_normalized_guidance(mesh: MeshSpec, which: tuple[Row, ...], ranks: RankPool, unets: Path) -> None:
    wanted = expected((16, 12), [], after=partial(guided, which), which=which)
    for (out,) in ranks(mesh.world_size, results_case, unets / FILE, mesh, (16, 12), [NAG], which):
        assert_alike(out, wanted)


@torch.inference_mode()
def loop_case(path: Path, mesh: MeshSpec, at_once: bool) -> Tensor:
    """As an evaluation of the whole loop has it: two latents for cond, then for uncond; or as one of all four rows."""
    model: Predictor = predictor(path, mesh, SDXL)
    rows, extras = rows_of((16, 12)), Extras().read([NAG], [], model, (16, 12), (0, 1))
    x, context, pooled = rows.x[:2], rows.prompt.context, rows.prompt.pooled
    if at_once:
        which: tuple[Row, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
        times = torch.full((4,), 500.0)
        return model.output(Rows(torch.cat([x, x]), times, rows.prompt, extras=extras, which=which))
    cond, uncond = (Prompt(context[part], pooled[part]) for part in (slice(2), slice(2, 4)))
    return torch.cat(model.outputs(x, torch.tensor(500.0), model.share(2, [cond, uncond], extras), Step()))


@pytest.mark.parametrize("mesh", ROW_MESHES, ids=MeshSpec.describe)
def test_normalized_guidance_in_the_whole_loop(mesh: MeshSpec, ranks: RankPool, unets: Path) -> None:
    wanted = loop_case(unets / FILE, MeshSpec(), True)
    for out in ranks(mesh.world_size, loop_case, unets / FILE, mesh, False):
        assert_alike(out, wanted)


def test_normalized_guidance_in_displaced_steps(backend2: Backend, unets: Path) -> None:
    """It acts on each token by itself; the other band's keys and values are of the step before."""
    model = backend2.load_model(unets / FILE, MeshSpec(patch=2), "float32")
    cond, uncond = (Conditioning(*unet_prompt(CONFIGS["tiny"], seed, 77)) for seed in (1, 2))

    def sampled(*extras: AnyExtra, **settings: Any) -> Tensor:
        empty = torch.zeros(1, 4, 32, 24)
        return model.sample(empty, cond, uncond, steps=8, cfg_scale=3.0, extras=extras, **settings)

    exact, displaced, without = sampled(NAG), sampled(NAG, warmup_steps=3), sampled(warmup_steps=3)
    assert 0 < (displaced - exact).norm() < 0.1 * (exact - without).norm()
    with pytest.raises(UnsupportedError, match="Displaced steps can't honour smoothed energy guidance"):
        sampled(BlurQueries(places=[FINE], blur=None), warmup_steps=3)


def test_a_sampling_names_what_it_can_not_have(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / FILE, MeshSpec(cfg=2), "float32")
    cond, uncond = (Conditioning(*unet_prompt(CONFIGS["tiny"], seed, tokens)) for seed, tokens in ((1, 77), (2, 154)))
    empty = torch.zeros(1, 4, 16, 12)
    with pytest.raises(UnsupportedError, match="normalized attention guidance mixes rows of both prompts"):
        model.sample(empty, cond, uncond, steps=1, extras=[NAG])
    with pytest.raises(UnsupportedError, match="self-attention guidance reports of each evaluation"):
        model.sample(empty, cond, cond, steps=1, extras=[ReportScores(place=MIDDLE)])
    with pytest.raises(InputError, match="A blur of 5 tokens is more than twice"):
        model.sample(torch.zeros(1, 4, 8, 16), cond, cond, steps=1, extras=[BlurQueries(places=[MIDDLE], blur=1.0)])
    with pytest.raises(InputError, match="don't fit the 8 x 6 tokens at input 3 0"):
        model.sample(empty, cond, cond, steps=1, extras=[TiledAttention(places=[FINE], tiles=[(2, 4, 8, 8)])])


@torch.inference_mode()
def recorded_case(path: Path, mesh: MeshSpec) -> tuple[int, int]:
    """Evaluations of all kinds by turns, with recordings and without: how many were recorded, and done again by them."""
    plain, size = predictor(path, mesh, SDXL), (21, 13)
    model, recorder = replace(plain), Recorder()
    model.captured = CapturedNetwork(plain.network, plain.mesh, recorder)
    tiles = TiledAttention(places=[FINE], tiles=[(11, 1, 11, 7)])
    asked = [[NAG], [tiles], [BlurQueries(places=[FINE], blur=None)], [ReportScores(place=MIDDLE)]]
    rows = [replace(rows_of(size), extras=Extras().read(one, [], plain, size, (0, 1))) for one in asked]
    expected_ones = [plain.output_and_reports(given) for given in rows]
    for _ in range(3):
        for given, wanted in zip(rows, expected_ones, strict=True):
            found = model.output_and_reports(given)
            assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    return recorder.recorded_ones, recorder.done_again


@pytest.mark.parametrize("mesh", [MeshSpec(), MeshSpec(cfg=2), MeshSpec(patch=2)], ids=MeshSpec.describe)
def test_recordings_give_what_runs_as_ever_and_none_is_made_of_what_reports(
    mesh: MeshSpec, ranks: RankPool, unets: Path
) -> None:
    assert set(ranks(mesh.world_size, recorded_case, unets / FILE, mesh)) == {(3, 6)}
