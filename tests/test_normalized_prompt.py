"""Guidance away from what attention takes of a negative prompt of its own, in the ranks: beside its formula in plain models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rank_pool import RankPool
from served import POSITIVE, random_prompt
from test_attention_patches import FILE, ROW_MESHES, WHICH, assert_alike, attended, rows_of
from test_extras import SDXL, predictor, seeded
from torch import Tensor

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.reading import Extras, read_extra
from parallel_backend.extras.target import Target
from parallel_backend.models.extra import Row
from parallel_backend.models.families import SD3, Kind
from parallel_backend.models.mmdit import JointBlock
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.conditioning import Conditioning
from parallel_backend.rpc.extras import NormalizedJointPrompt, NormalizedPrompt
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

SCALE, ALPHA, TAU = 4.0, 0.6, 1.5
NUMBERS = {"scale": SCALE, "alpha": ALPHA, "tau": TAU}
SIZE = (21, 13)
PLACES = [("input", 3, 0), ("middle", 0, 0), ("output", 1, 1)]
TOKENS = 11


def guided(positive: Tensor, negative: Tensor) -> Tensor:
    away = SCALE * positive - (SCALE - 1) * negative
    ratio = away.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    away = torch.where(ratio > TAU, away * TAU / ratio, away)
    return ALPHA * away + (1 - ALPHA) * positive


def of_unet() -> NormalizedPrompt[Tensor]:
    """Of another length than the rows' prompts."""
    return NormalizedPrompt(places=PLACES, prompt=seeded(1, 30, CONFIGS["tiny"].context_width, seed=7), **NUMBERS)


class Away:
    """A processor of a reference's attention to the prompt, of rows of `WHICH`."""

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        def taken(q: Tensor, prompt: Tensor) -> Tensor:
            return attended(q, attn.to_k(prompt), attn.to_v(prompt), attn.heads)

        q, prompt = attn.to_q(x), of_unet().prompt
        rows = list(taken(q, encoder_hidden_states).split(1))
        for number, (branch, _) in enumerate(WHICH):
            if branch == 0:
                rows[number] = guided(rows[number], taken(q[number : number + 1], prompt))
        return attn.to_out[0](torch.cat(rows))


@cache
def expected_of_unet() -> tuple[Tensor, Tensor]:
    """As it is, and guided."""
    model, rows = random_unet(CONFIGS["tiny"]), rows_of(SIZE)

    def output() -> Tensor:
        return model(rows.x, rows.timesteps, rows.prompt.context, class_labels=rows.prompt.pooled).sample

    with torch.inference_mode():
        plain = output()
        for place, block in attention_places(model).items():
            if place in PLACES:
                block.attn2.processor = Away()  # type: ignore[assignment]
        return plain, output()


@torch.inference_mode()
def output_case(
    path: Path, mesh: MeshSpec, kind: Kind, asked: Sequence[Any], given: Rows, which: Sequence[Row]
) -> Tensor:
    model = predictor(path, mesh, kind)
    tensors = [tensor for one in asked for tensor in one.tensors()]
    named = [one.each(lambda tensor: next(i for i, t in enumerate(tensors) if t is tensor)) for one in asked]
    extras = Extras().read(named, tensors, model, SIZE, (0, 1))
    return model.output(replace(given, extras=extras, which=tuple(which)))


@pytest.mark.parametrize("mesh", ROW_MESHES, ids=MeshSpec.describe)
def test_attention_to_the_prompt_is_guided_away(mesh: MeshSpec, ranks: RankPool, unets: Path) -> None:
    plain, wanted = expected_of_unet()
    assert (wanted - plain).abs().max() > 1e-2 * plain.abs().max()
    for out in ranks(mesh.world_size, output_case, unets / FILE, mesh, SDXL, [of_unet()], rows_of(SIZE), WHICH):
        assert_alike(out, wanted)


def of_mmdit() -> NormalizedJointPrompt[Tensor]:
    return NormalizedJointPrompt(context=seeded(1, TOKENS, 4096, seed=7), pooled=seeded(1, 2048, seed=8), **NUMBERS)


# A rank of cfg that has one latent of cond and one of uncond, and ranks without cond.
MMDIT_MESHES = [
    *(MeshSpec(), MeshSpec(ulysses=2), MeshSpec(ring=2), MeshSpec(tp=2), MeshSpec(pp=2), MeshSpec(cfg=2)),
    *(MeshSpec(dp=3), MeshSpec(ulysses=3), MeshSpec(tp=2, pp=2), MeshSpec(ring=2, ulysses=2)),
]
OF_MMDIT: tuple[Row, ...] = ((1, 0), (1, 1), (0, 0), (0, 1))


def mmdit_rows(further: bool = False) -> Rows:
    """Those of `OF_MMDIT`; with `further`, one more of the negative prompt for each of cond's, with its latent."""
    x, times = seeded(4, 16, *SIZE, seed=5), torch.linspace(900, 20, 4)
    prompt = Prompt(seeded(4, TOKENS, 4096, seed=1), seeded(4, 2048, seed=2))
    if not further:
        return Rows(x, times, prompt)
    negative = of_mmdit()
    prompt = Prompt(
        torch.cat([prompt.context, negative.context.expand(2, -1, -1)]),
        torch.cat([prompt.pooled, negative.pooled.expand(2, -1)]),
    )
    return Rows(torch.cat([x, x[2:]]), torch.cat([times, times[2:]]), prompt)


def of_cond(x: Tensor) -> Tensor:
    """Of six rows, the last two are as the two before."""
    return torch.cat([x[:4], x[2:4]])


class Between:
    """An `Attend` of six rows whose image tokens are guided: all else is the one that it stands for."""

    def __init__(self, attend: Any) -> None:
        self._attend = attend

    def joint(self, text: Any, image: Any, eps: float | None) -> tuple[Tensor, Tensor]:
        of_text, of_image = self._attend.joint(text, image, eps)
        return of_text, torch.cat([of_image[:2], guided(of_image[2:4], of_image[4:]), of_image[4:]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attend, name)


@torch.inference_mode()
def expected_of_mmdit(path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """On one process, from an evaluation of six whole rows."""
    forward = JointBlock.forward

    def beside(self: JointBlock, c: Tensor, x: Tensor, c_mod: Any, x_mod: Any, attend: Any) -> Any:
        attend_guided: Any = Between(attend)
        return forward(self, c, of_cond(x), c_mod, [of_cond(vector) for vector in x_mod], attend_guided)

    monkeypatch.setattr(JointBlock, "forward", beside)
    out = predictor(path, MeshSpec(), SD3).output(mmdit_rows(further=True))
    monkeypatch.undo()
    return out[:4]


@pytest.mark.parametrize("family", ["sd3.5-large", "sd3.5-medium"])
@pytest.mark.parametrize("mesh", MMDIT_MESHES, ids=MeshSpec.describe)
def test_joint_attention_is_guided_away(
    family: str, mesh: MeshSpec, ranks: RankPool, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family != "sd3.5-large" and mesh not in (MeshSpec(tp=2), MeshSpec(pp=2)):
        pytest.skip("the second attention of its blocks is as elsewhere")
    path = large.with_name(f"{family}.safetensors")
    wanted = expected_of_mmdit(path, monkeypatch)
    plain = output_case(path, MeshSpec(), SD3, [], mmdit_rows(), OF_MMDIT)
    assert (wanted - plain).abs().max() > 1e-2 * plain.abs().max()
    assert_alike(wanted[:2], plain[:2])  # uncond is as it was
    for out in ranks(mesh.world_size, output_case, path, mesh, SD3, [of_mmdit()], mmdit_rows(), OF_MMDIT):
        assert_alike(out, wanted)


def changed(**fields: Any) -> NormalizedJointPrompt[Tensor]:
    """Of the prompt's own length."""
    return msgspec.structs.replace(of_mmdit(), **{"context": seeded(1, 154, 4096, seed=7), **fields})


WRONG: list[tuple[list[Any], type[Exception], str]] = [
    ([of_mmdit()], InputError, "has 11 tokens, and the prompt 154"),
    ([changed(pooled=torch.zeros(1, 5))], InputError, r"has shapes \[1, 154, 4096\] and \[1, 5\]; this model needs"),
    ([changed(context=torch.zeros(2, 154, 4096))], InputError, r"has shapes \[2, 154, 4096\]"),
    ([changed(tau=-0.5)], InputError, "tau=-0.5 of normalized attention guidance is no limit"),
    ([changed(), changed(scale=2.0)], UnsupportedError, "can't be honoured together"),
    ([of_unet()], UnsupportedError, "NormalizedPrompt acts inside a UNet; this model is a sd3.5-large"),
]


@pytest.mark.parametrize(("asked", "kind", "words"), WRONG, ids=[words[:30] for _, _, words in WRONG])
def test_what_does_not_fit_is_named_before_the_first_step(
    asked: list[Any], kind: type[Exception], words: str, model: RemoteModel
) -> None:
    steps: list[Any] = []
    with pytest.raises(kind, match=words):
        model.sample(torch.zeros(1, 16, 8, 8), POSITIVE, None, steps=2, extras=asked, on_step=steps.append)
    assert not steps


def test_so_it_is_of_a_unet(unets: Path) -> None:
    target = Target(predictor(unets / FILE, MeshSpec(), SDXL), *SIZE)
    for fields, words in (
        ({"places": [("input", 99, 0)]}, "Transformer block input 99 0 is named"),
        ({"prompt": torch.zeros(1, 30, 5)}, r"has shape \[1, 30, 5\]; this model needs \(1, tokens, "),
        ({"prompt": torch.zeros(2, 30, CONFIGS["tiny"].context_width)}, r"has shape \[2, 30, "),
    ):
        with pytest.raises(InputError, match=words):
            read_extra(msgspec.structs.replace(of_unet(), **fields), target)


def test_a_rank_without_rows_waits_for_the_others(backend2: Backend, large: Path) -> None:
    asked, negative = [changed(end=0.3)], Conditioning(*random_prompt(2, 154))
    outs = [
        backend2.load_model(large, mesh, "float32").sample(
            torch.zeros(1, 16, 8, 8), POSITIVE, negative, steps=3, seed=1, cfg_scale=scale, extras=asked
        )
        for scale in (1.0, 3.0)
        for mesh in (MeshSpec(tp=2), MeshSpec(cfg=2), MeshSpec(dp=2))
    ]
    for same in (outs[:3], outs[3:]):
        for out in same[1:]:
            assert (out - same[0]).abs().max() <= 1e-5 * same[0].abs().max()
    assert (outs[0] - outs[3]).abs().max() > 1e-2
