"""What acts between the blocks of a UNet, in bands: FreeU, deep shrink and RAU-Net equal plain formulas on the whole picture, in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from local_network import local_network
from rank_pool import RankPool, groups
from torch import Tensor
from unet_inputs import inputs, unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.resize import resized
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.reading import Extras
from parallel_backend.models.families import SDXL
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.residuals import Residuals
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.rpc.extras import (
    AnyExtra,
    DownsampleByFour,
    Downscale,
    FreeU,
    Rescale,
    RescaleBack,
    ShiftedWindows,
    UpsampleBy,
)
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

pytestmark = pytest.mark.busy

Size = tuple[int, int, int]
# Of the tiny model's widths.
FACTORS = [(128, 1.3, 0.5), (64, 1.4, 0.2)]
FREE_U = FreeU(factors=FACTORS, by_structure=False)
FREE_U_V2 = FreeU(factors=FACTORS, by_structure=True)


def replaced(asked: FreeU, **changed: Any) -> FreeU:
    return msgspec.structs.replace(asked, **changed)


def shrink(block: int, **changed: Any) -> Downscale:
    settings = {"factor": 2.0, "after_skip": True, "method": "bicubic", "back": "bilinear", "order": 1}
    return Downscale(block=block, **(settings | changed))


def rescale(block: int, **changed: Any) -> Rescale:
    settings = {"factors": (2.0, 2.0), "unit": 1.0, "after_skip": False, "method": "bilinear"}
    return Rescale(blocks=(block,), **(settings | changed))


GAINS = {"before": 0.9, "after": 1.2}
TWICE_APART: list[AnyExtra] = [
    DownsampleByFour(block=2, **GAINS),
    UpsampleBy(block=3, method="bicubic", halfway="nearest", **GAINS),
]
# The tiny model's input blocks: 0 and 1 of the whole size, 2 and 3 of half of it, 4 and 5 of a quarter.
CASES: dict[str, list[AnyExtra]] = {
    "FreeU": [FREE_U],
    "FreeU_V2": [FREE_U_V2],
    "FreeU at all places": [
        replaced(FREE_U_V2, at="input", scaled=[96, 40]),
        replaced(FREE_U_V2, at="middle", scaled=[100, 64]),
        replaced(FREE_U_V2, scaled=[96, 0], cycles=2),
    ],
    "many frequencies": [replaced(FREE_U, cycles=4)],
    "shrunk where a scale begins": [shrink(2)],
    "shrunk where a scale ends, by 1.5": [shrink(3, factor=1.5, method="area", back="nearest-exact")],
    "shrunk before the skip": [shrink(3, after_skip=False, method="bilinear", back="bicubic")],
    "shrunk at first, before the skip of the next": [shrink(1, after_skip=False, factor=1.7, method="nearest-exact")],
    "shrunk at last": [shrink(5, factor=1.4, method="bislerp", back="bislerp")],
    "larger": [shrink(4, factor=0.6)],
    "shrunk twice": [shrink(1, factor=1.3), shrink(3, factor=1.5)],
    "FreeU before what is resized back": [FREE_U_V2, shrink(3)],
    "RAU-Net": TWICE_APART,
    "RAU-Net, smaller before the skip, too": [
        *TWICE_APART,
        DownsampleByFour(block=4),
        rescale(3, method="area", factors=(1.5, 2.0)),
        RescaleBack(blocks=(3,), method="bicubic", **GAINS),
    ],
    "means of cells": [
        rescale(2, method="avg_pool2d", after_skip=True, round_up=False, factors=(2.0, 3.0), **GAINS),
        RescaleBack(blocks=(2, 3), method="bislerp"),
    ],
    "means of cells, rounded up, after deep shrink": [
        shrink(2, factor=1.3),
        rescale(2, method="avg_pool2d", after_skip=True, first=1),
        RescaleBack(blocks=(3,), method="nearest"),
    ],
    "FreeU after it": [FreeU(factors=FACTORS, by_structure=True, order=2), shrink(2)],
    "residuals in the size within": [shrink(3, after_skip=False, scales_residuals=True), *TWICE_APART],
}
SIZES: list[Size] = [(2, 16, 16), (1, 21, 13)]
MESHES = [MeshSpec(), MeshSpec(patch=2), MeshSpec(patch=3), MeshSpec(patch=2, sliced=True)]


def filtered(skip: Tensor, factor: float, cycles: int) -> Tensor:
    """Of the spectrum of the whole picture, the values around the middle are multiplied."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(skip, dim=(-2, -1)), dim=(-2, -1))
    y, x = (side // 2 for side in skip.shape[-2:])
    spectrum[..., y - cycles : y + cycles, x - cycles : x + cycles] *= factor
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real


def weighed(asked: FreeU, h: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Any]:
    for number, (channels, of_image, of_skip) in enumerate(asked.factors):
        if channels == h.shape[1]:
            mean = h.mean(1, keepdim=True)
            least, most = (mean.flatten(1).aminmax(dim=1)[i].view(-1, 1, 1, 1) for i in (0, 1))
            factor = (of_image - 1) * (mean - least) / (most - least) + 1 if asked.by_structure else of_image
            few = channels // 2 if asked.scaled is None else asked.scaled[number]
            skip = None if skip is None else filtered(skip, of_skip, asked.cycles)
            return torch.cat([h[:, :few] * factor, h[:, few:]], 1), skip
    return h, skip


def smaller(asked: Downscale, h: Tensor) -> Tensor:
    return resized(h, *(round(side / asked.factor) for side in h.shape[2:]), asked.method)


def as_large(asked: Downscale, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    return (h if h.shape[2] == skip.shape[2] else resized(h, *skip.shape[2:], asked.back)), skip


def rescaled(asked: Rescale, h: Tensor) -> Tensor:
    aimed = [int(max(asked.unit, side / asked.unit // f * asked.unit)) for side, f in zip(h.shape[2:], asked.factors)]
    if asked.method != "avg_pool2d":
        return F.interpolate(h * asked.before, size=aimed, mode=asked.method) * asked.after
    cells = [side // part for side, part in zip(h.shape[2:], aimed, strict=True)]
    return F.avg_pool2d(h * asked.before, cells, ceil_mode=asked.round_up) * asked.after


def given_by(number: int, h: Tensor, asked: list[AnyExtra]) -> tuple[Tensor, Tensor]:
    """What an input block gives as a skip connection, and to the next block."""
    skip = h
    for after_skip in (False, True):
        for a in asked:
            if isinstance(a, Downscale) and (a.block, a.after_skip) == (number, after_skip):
                h = smaller(a, h)
            elif isinstance(a, Rescale) and number in a.blocks and a.after_skip == after_skip:
                h = rescaled(a, h)
            elif isinstance(a, FreeU) and a.at == "input" and not after_skip:
                h = weighed(a, h)[0]
        skip = skip if after_skip else h
    return skip, h


def joined(number: int, h: Tensor, skip: Tensor, asked: list[AnyExtra]) -> Tensor:
    """What an output block is given."""
    for a in sorted(asked, key=lambda a: getattr(a, "order", 0)):
        if isinstance(a, Downscale):
            h, skip = as_large(a, h, skip)
        elif isinstance(a, FreeU) and a.at == "output":
            h, skip = weighed(a, h, skip)
        elif isinstance(a, RescaleBack) and number in a.blocks and h.shape[2:] != skip.shape[2:]:
            h = resized(h * a.before, *skip.shape[2:], a.method) * a.after
    return torch.cat([h, skip], 1)


def downsampled(number: int, layer: Any, asked: list[AnyExtra], h: Tensor) -> Tensor:
    for a in asked:
        if isinstance(a, DownsampleByFour) and a.block == number:
            given = {"stride": 4, "padding": 2, "dilation": 2}
            return F.conv2d(h * a.before, layer.conv.weight, layer.conv.bias, **given) * a.after
    return layer(h)


def upsampled(number: int, layer: Any, asked: list[AnyExtra], h: Tensor, sides: torch.Size) -> Tensor:
    for a in asked:
        if isinstance(a, UpsampleBy) and a.block == number:
            h = h * a.before
            if a.halfway is not None:
                h = resized(h, sides[0] // 2, sides[1] // 2, a.halfway)
            return layer.conv(resized(h, *sides, a.method)) * a.after
    return layer.conv(F.interpolate(h, size=sides))


def added(h: Tensor, residual: Tensor | None, scales: bool = False) -> Tensor:
    if residual is None:
        return h
    if scales:
        residual = F.interpolate(residual, size=h.shape[2:], mode="bilinear")
    return h + residual if h.shape == residual.shape else h


@cache
def expected(case: str, size: Size, with_residuals: bool = False) -> Tensor:
    """The tiny UNet of diffusers, block after block in one process, whole."""
    asked, residuals = (
        CASES.get(case, []),
        residuals_of(size) if with_residuals else Residuals([None] * 6, None, [None] * 6),
    )
    model, (x, timesteps, context, y) = random_unet(CONFIGS["tiny"]), inputs("tiny", size)
    with torch.inference_mode():
        emb = model.time_embedding(model.time_proj(timesteps)) + model.class_embedding(y)

        def through(block: Any, i: int, h: Tensor) -> Tensor:
            h = block.resnets[i](h, emb)
            return block.attentions[i](h, context)[0] if hasattr(block, "attentions") else h

        steps: list[Callable[[Tensor], Tensor]] = [model.conv_in]
        for block in model.down_blocks:
            steps += [lambda h, block=block: through(block, 0, h), *(block.downsamplers or ())]
        h, skips, scales = x, [], any(getattr(a, "scales_residuals", False) for a in asked)
        for number, step in enumerate(steps):
            h = step(h) if number in (0, 1, 3, 5) else downsampled(number, step, asked, h)
            skip, h = given_by(number, added(h, residuals.input[number], scales), asked)
            skips.append(skip)
        h = added(model.mid_block(h, emb, context), residuals.middle, scales)
        for a in asked:
            h = weighed(a, h)[0] if isinstance(a, FreeU) and a.at == "middle" else h
        for number in range(6):
            block, skip = model.up_blocks[number // 2], skips.pop()
            skip = added(skip, residuals.output[len(skips)], scales)
            h = through(block, number % 2, joined(number, h, skip, asked))
            for upsampler in (block.upsamplers or ()) if number % 2 else ():
                h = upsampled(number, upsampler, asked, h, skips[-1].shape[2:])
        return model.conv_out(model.conv_act(model.conv_norm_out(h)))


def residuals_of(size: Size) -> Residuals:
    batch, height, width = size
    generator = torch.Generator().manual_seed(3)

    def one(channels: int, level: int) -> Tensor:
        return torch.randn(batch, channels, -(-height // 2**level), -(-width // 2**level), generator=generator)

    config = CONFIGS["tiny"]
    return Residuals([one(*place) for place in config.places], one(128, 2), [one(*place) for place in config.places])


@cache
def predictor(path: Path, mesh: MeshSpec) -> Predictor:
    built = build_mesh(mesh, groups())
    return Predictor(local_network(path, built), built, torch.float32, torch.device("cpu"), SDXL)


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, case: str, size: Size, with_residuals: bool = False) -> Tensor:
    model, (x, timesteps, context, y) = predictor(path, mesh), inputs("tiny", size)
    acting = Extras().read(CASES.get(case, []), [], model, size[1:], (0,))
    rows = Rows(x, timesteps, Prompt(context, y), extras=acting, which=tuple((0, i) for i in range(size[0])))
    return model.output(replace(rows, residuals=residuals_of(size)) if with_residuals else rows)


def assert_near(out: Tensor, wanted: Tensor) -> None:
    assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_formulas(case: str, size: Size, mesh: MeshSpec, ranks: RankPool, unets: Path) -> None:
    wanted = expected(case, size)
    assert (wanted - expected("none", size)).abs().max() > 1e-2 * wanted.abs().max()
    for out in ranks(mesh.world_size, output_case, unets / "unet-tiny.safetensors", mesh, case, size):
        assert_near(out, wanted)


@pytest.mark.parametrize("size", [(1, 5, 3), (1, 9, 4), (1, 12, 5)], ids=str)
@pytest.mark.parametrize("case", ["FreeU_V2", "shrunk where a scale begins", "larger", "RAU-Net"])
def test_latents_too_small_for_bands_are_computed_whole(case: str, size: Size, ranks: RankPool, unets: Path) -> None:
    """Some within alone, some outside alone."""
    for out in ranks(3, output_case, unets / "unet-tiny.safetensors", MeshSpec(patch=3), case, size):
        assert_near(out, expected(case, size))


@pytest.mark.parametrize(
    "case", ["FreeU", "shrunk where a scale begins", "shrunk before the skip", "residuals in the size within"]
)
def test_residuals_are_added_where_they_fit(case: str, ranks: RankPool, unets: Path) -> None:
    size = SIZES[1]
    for out in ranks(2, output_case, unets / "unet-tiny.safetensors", MeshSpec(patch=2), case, size, True):
        assert_near(out, expected(case, size, True))


@pytest.fixture(scope="module")
def model(backend2: Backend, unets: Path) -> RemoteModel:
    return backend2.load_model(str(unets / "unet-tiny.safetensors"), MeshSpec(patch=2), "float32")


def windows(rows: int, columns: int, down: int = 0, method: str = "nearest") -> ShiftedWindows:
    window = (rows, columns, down, 0)
    return ShiftedWindows(places=[("input", 3, 0)], windows=[window], method=method, back="nearest")


LATENT = torch.zeros(1, 4, 16, 16)
PROMPT = Conditioning(*unet_prompt(CONFIGS["tiny"], 1))
WRONG: list[tuple[AnyExtra, str]] = [
    (shrink(6), "Input block 6 is named"),
    (shrink(2, method="lanczos"), "no method 'lanczos'"),
    (shrink(2, factor=0.0), "divided by 0"),
    (shrink(4, factor=9.0), "by 9 none at all"),
    (shrink(0, after_skip=False), "the whole result"),
    (rescale(6), "Input block 6 is named"),
    (rescale(3, method="lanczos"), "no method 'lanczos'"),
    (rescale(3, factors=(0.0, 2.0)), "can't be divided by 0 and 2 to multiples of 1"),
    (rescale(3, unit=0.0), "can't be divided by 2 and 2 to multiples of 0"),
    (rescale(3), "At output block 3 a picture of 4 x 4 values .* meets one of 8 x 8"),
    (rescale(2, after_skip=True, start=0.3), "At output block 3 a picture of 4 x 4 values .* meets one of 8 x 8"),
    (rescale(0), "At the end a picture of 8 x 8 values .* meets one of 16 x 16"),
    (RescaleBack(blocks=(9,), method="area"), "Output block 9 is named"),
    (DownsampleByFour(block=3), "Downsampling input block 3 is named"),
    (UpsampleBy(block=5, method="area"), "Upsampling output block 5 is named"),
    (UpsampleBy(block=1, method="area", halfway="lanczos"), "no method 'lanczos'"),
    (windows(6, 8), "Windows of 6 x 8 tokens came for the 8 x 8 tokens at input 3 0"),
    (windows(8, 8, -1), "Windows of 8 x 8 tokens, shifted by -1 and 0"),
    (windows(8, 8, method="lanczos"), "no method 'lanczos'"),
]


@pytest.mark.parametrize(("asked", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_does_not_fit_is_named_before_the_first_step(asked: AnyExtra, words: str, model: RemoteModel) -> None:
    with pytest.raises(InputError, match=words):
        model.sample(LATENT, PROMPT, PROMPT, steps=2, extras=[asked])


def test_displaced_steps_refuse_them_by_name(model: RemoteModel) -> None:
    with pytest.raises(UnsupportedError, match="honour FreeU, which needs"):
        model.sample(LATENT, PROMPT, PROMPT, steps=4, warmup_steps=1, extras=[FREE_U])
