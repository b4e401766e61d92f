"""Outputs of attention layers that are kept for later evaluations, on bands and rows of several ranks, against diffusers' model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from test_attention_patches import FILE, assert_alike
from test_extras import SDXL, predictor, seeded
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.kept_outputs import MOST_SAMPLINGS
from parallel_backend.extras.reading import Extras
from parallel_backend.models.extra import Row
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import Downscale, KeptAttention, KeptForm
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

SIZE = (21, 13)
# As ComfyUI's sampling has them, uncond first; and cond alone.
BOTH: tuple[Row, ...] = ((1, 0), (1, 1), (0, 0), (0, 1))
COND: tuple[Row, ...] = ((0, 0), (0, 1))
# Of self-attentions and attentions to the prompt, by evaluation.
Evaluations = Sequence[tuple[tuple[Row, ...], KeptForm, KeptForm]]
CROSS: Evaluations = [(BOTH, "computed", "kept"), (BOTH, "computed", "taken"), (COND, "computed", "taken_mean")]
# A mean is taken twice; what is kept after that is another's.
ALL: Evaluations = [
    (BOTH, "kept", "kept"),
    (BOTH, "taken", "kept"),
    (COND, "taken_mean", "taken_mean"),
    (COND[:1], "taken_mean", "taken_mean"),
    (COND, "kept", "computed"),
    (COND, "taken", "kept"),
]
MESHES = [
    *(MeshSpec(), MeshSpec(patch=3), MeshSpec(cfg=2), MeshSpec(dp=2), MeshSpec(cfg=2, dp=2)),
    *(MeshSpec(cfg=2, patch=2), MeshSpec(patch=2, sliced=True)),
]


def given_at(number: int, which: Sequence[Row]) -> tuple[Tensor, Tensor, Prompt]:
    prompt = Prompt(*unet_prompt(CONFIGS["tiny"], number, 77, len(which)))
    return seeded(len(which), 4, *SIZE, seed=number), torch.linspace(900, 20, len(which)), prompt


def asked_for(own: KeptForm, cross: KeptForm, sampling: str = "one") -> list[Any]:
    return [KeptAttention(sampling=sampling, self_attention=own, cross_attention=cross)]


@torch.inference_mode()
def outputs_case(path: Path, mesh: MeshSpec, evaluations: Evaluations) -> list[Tensor]:
    model: Predictor = predictor(path, mesh, SDXL)
    kept, outputs = Extras(), []
    for number, (which, own, cross) in enumerate(evaluations):
        extras = kept.read(asked_for(own, cross), [], model, SIZE, (0, 1))
        outputs.append(model.output(Rows(*given_at(number, which), extras=extras, which=which)).clone())
    return outputs


class Gated:
    """diffusers' processor of an attention, with what it gave before."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.form, self.latents = inner, "computed", [0]
        self.kept = torch.zeros(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.form == "taken":
            return self.kept
        if self.form == "taken_mean":
            return torch.stack(self.kept.split(2)).mean(0)[self.latents]
        out: Tensor = self.inner(*args, **kwargs)
        if self.form == "kept":
            self.kept = out
        return out


@cache
def expected(is_all: bool) -> list[Tensor]:
    model, outputs = random_unet(CONFIGS["tiny"]), []
    blocks = attention_places(model).values()
    for block in blocks:
        for attention in (block.attn1, block.attn2):
            attention.processor = Gated(attention.processor)  # type: ignore[assignment]
    for number, (which, *forms) in enumerate(ALL if is_all else CROSS):
        for block in blocks:
            for attention, form in zip((block.attn1, block.attn2), forms, strict=True):
                gated: Any = attention.processor
                gated.form, gated.latents = form, [latent for _, latent in which]
        x, times, prompt = given_at(number, which)
        with torch.inference_mode():
            outputs.append(model(x, times, prompt.context, class_labels=prompt.pooled).sample)
    return outputs


@pytest.mark.parametrize("is_all", [False, True], ids=["cross-attention", "all"])
@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
def test_kept_outputs_equal_diffusers(mesh: MeshSpec, is_all: bool, ranks: RankPool, unets: Path) -> None:
    for outputs in ranks(mesh.world_size, outputs_case, unets / FILE, mesh, ALL if is_all else CROSS):
        for out, wanted in zip(outputs, expected(is_all), strict=True):
            assert_alike(out, wanted)


@torch.inference_mode()
def test_what_is_not_kept_is_named(unets: Path) -> None:
    model: Predictor = predictor(unets / FILE, MeshSpec(), SDXL)
    kept = Extras()

    def read(*forms: KeptForm, sampling: str = "one", size: tuple[int, int] = SIZE) -> Any:
        return kept.read(asked_for(*forms, sampling=sampling), [], model, size, (0, 1))

    def evaluate(extras: Any, which: tuple[Row, ...]) -> None:
        model.output(Rows(*given_at(1, which), extras=extras, which=which))

    with pytest.raises(InputError, match="not kept of the sampling 'one'"):
        read("computed", "taken")
    evaluate(read("computed", "kept"), BOTH)
    with pytest.raises(InputError, match="not kept"):
        read("taken", "computed")
    with pytest.raises(
        InputError, match=r"latents of \(21, 13\) \(height, width\), and takes them for latents of \(16, 12\)"
    ):
        read("computed", "taken", size=(16, 12))
    with pytest.raises(InputError, match="kept outputs of 4 rows, and takes them for 2"):
        evaluate(read("computed", "taken"), COND)
    with pytest.raises(InputError, match="kept outputs of 4 rows, and takes them for 1"):
        evaluate(read("computed", "taken_mean"), ((0, 2),))
    kept.end(["another"])
    evaluate(read("computed", "taken_mean"), COND)
    kept.end(["one"])
    with pytest.raises(InputError, match="not kept"):
        read("computed", "taken_mean")
    for number in range(1 + MOST_SAMPLINGS):
        evaluate(read("computed", "kept", sampling=str(number)), COND)
    with pytest.raises(InputError, match="not kept of the sampling '0'"):
        read("computed", "taken", sampling="0")
    evaluate(read("computed", "taken", sampling="2"), COND)


def test_a_whole_sampling_is_asked_for_without_it(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / FILE, MeshSpec(patch=2), "float32")
    cond = Conditioning(*unet_prompt(CONFIGS["tiny"], 1, 77))
    with pytest.raises(UnsupportedError, match="T-Gate is told at each evaluation"):
        model.sample(torch.zeros(1, 4, 16, 12), cond, cond, steps=1, extras=asked_for("computed", "kept"))


@torch.inference_mode()
def test_rows_are_not_taken_once_their_mean_was(unets: Path) -> None:
    model, kept = predictor(unets / FILE, MeshSpec(), SDXL), Extras()
    for form in ("kept", "taken_mean"):
        extras = kept.read(asked_for("computed", form), [], model, SIZE, (0, 1))  # type: ignore[arg-type]
        which = BOTH if form == "kept" else COND
        model.output(Rows(*given_at(1, which), extras=extras, which=which))
    with pytest.raises(InputError, match="not kept"):
        kept.read(asked_for("computed", "taken"), [], model, SIZE, (0, 1))


def test_a_picture_of_another_size_within_is_refused(unets: Path) -> None:
    model = predictor(unets / FILE, MeshSpec(), SDXL)
    shrink = Downscale(block=2, factor=2.0, after_skip=True, method="bilinear", back="bilinear", end=5.0)
    with pytest.raises(UnsupportedError, match="T-Gate can't be honoured beside deep shrink"):
        Extras().read([*asked_for("computed", "kept"), shrink], [], model, SIZE, (0, 1))
