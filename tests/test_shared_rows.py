"""Rows that take from others in self-attentions and group norms, on bands and rows of several ranks, against diffusers' model."""

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
from recordings import Recorder
from test_attention_patches import FILE, WHICH, assert_alike, attended, rows_of
from test_extras import SDXL, predictor
from torch import Tensor, nn
from unet_inputs import unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.distributed.stale import Step
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.reading import Extras
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.extra import Row
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import AnyExtra, SharedAttention, SharedNorms
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

SIZE = (21, 13)
# As StyleAligned has them at a scale of 1: the first latent of each prompt.
FIRST: list[Row] = [(1, 0), (1, 0), (0, 0), (0, 0)]
NORMS = SharedNorms(rows=list(WHICH), sources=FIRST)
PLAIN = SharedAttention(rows=list(WHICH), sources=FIRST, key_sources=FIRST, key_weights=[1.0] * 4)
MATCHED = msgspec.structs.replace(PLAIN, matched=["q", "k"])
# And at others: every second row.
WEIGHED = msgspec.structs.replace(
    MATCHED,
    key_sources=[(1, 0), (0, 0), (1, 0), (0, 0)],
    key_weights=[1.0, 0.7, 0.7, 0.7],
    matched=["q", "k", "v"],
)
ASKED: dict[str, list[AnyExtra]] = {"norms": [NORMS], "plain": [PLAIN], "weighed": [WEIGHED], "all": [MATCHED, NORMS]}
MESHES = [
    *(MeshSpec(), MeshSpec(patch=3), MeshSpec(dp=2), MeshSpec(cfg=2, dp=2)),
    *(MeshSpec(cfg=2, patch=2), MeshSpec(patch=2, sliced=True)),
]


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, asked: Sequence[AnyExtra]) -> Tensor:
    model: Predictor = predictor(path, mesh, SDXL)
    extras = Extras().read(asked, [], model, SIZE, (0, 1))
    return model.output(replace(rows_of(SIZE), extras=extras)).clone()


class WithOthers:
    """diffusers' self-attention of each row's tokens and another's."""

    def __init__(self, asked: SharedAttention) -> None:
        self.matched, self.weights = asked.matched, torch.tensor(asked.key_weights)[:, None, None]
        self.values = [WHICH.index(row) for row in asked.sources]
        self.keys = [WHICH.index(row) for row in asked.key_sources]

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        mean, deviation = hidden_states.mean(1, keepdim=True), (hidden_states.var(1, keepdim=True) + 1e-5).sqrt()
        changed = (hidden_states - mean) / deviation * deviation[self.values] + mean[self.values]
        q, k, v = (changed if name in self.matched else hidden_states for name in "qkv")
        k, v = torch.cat([k, k[self.keys] * self.weights], 1), torch.cat([v, v[self.values]], 1)
        return attn.to_out[0](attended(attn.to_q(q), attn.to_k(k), attn.to_v(v), attn.heads))


class NormedWithOthers(nn.Module):
    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_BCYX: Tensor) -> Tensor:
        others = x_BCYX[[WHICH.index(row) for row in FIRST]]
        return self.norm(torch.cat([x_BCYX, others], 2))[:, :, : x_BCYX.shape[2]]


@cache
def expected(name: str) -> Tensor:
    model, rows = random_unet(CONFIGS["tiny"]), rows_of(SIZE)
    for asked in ASKED[name]:
        if isinstance(asked, SharedAttention):
            for block in attention_places(model).values():
                block.attn1.processor = WithOthers(asked)  # type: ignore[assignment]
        else:
            for module in list(model.modules()):
                for child, layer in module.named_children():
                    if isinstance(layer, nn.GroupNorm):
                        setattr(module, child, NormedWithOthers(layer))
    with torch.inference_mode():
        return model(rows.x, rows.timesteps, rows.prompt.context, class_labels=rows.prompt.pooled).sample


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
def test_rows_take_from_others_as_in_diffusers(mesh: MeshSpec, name: str, ranks: RankPool, unets: Path) -> None:
    for out in ranks(mesh.world_size, output_case, unets / FILE, mesh, ASKED[name]):
        assert_alike(out, expected(name))


@torch.inference_mode()
def loop_case(path: Path, mesh: MeshSpec, at_once: bool) -> Tensor:
    """As an evaluation of the whole loop has it: three latents for cond, then for uncond; or as one of all six rows."""
    model: Predictor = predictor(path, mesh, SDXL)
    which: tuple[Row, ...] = tuple((branch, latent) for branch in (0, 1) for latent in range(3))
    first: list[Row] = [(branch, 0) for branch, _ in which]
    attention = SharedAttention(
        rows=list(which), sources=first, key_sources=first, key_weights=[1.0] * 6, matched=["q"]
    )
    asked = [attention, SharedNorms(rows=list(which), sources=first)]
    rows, extras = rows_of(SIZE, which), Extras().read(asked, [], model, SIZE, (0, 1))
    x, context, pooled = rows.x[:3], rows.prompt.context, rows.prompt.pooled
    if at_once:
        given = Rows(torch.cat([x, x]), torch.full((6,), 500.0), rows.prompt, extras=extras, which=which)
        return model.output(given)
    cond, uncond = (Prompt(context[part], pooled[part]) for part in (slice(3), slice(3, 6)))
    return torch.cat(model.outputs(x, torch.tensor(500.0), model.share(3, [cond, uncond], extras), Step()))


@pytest.mark.parametrize("mesh", [*MESHES, MeshSpec(dp=3)], ids=MeshSpec.describe)
def test_rows_take_from_others_in_the_whole_loop(mesh: MeshSpec, ranks: RankPool, unets: Path) -> None:
    wanted = loop_case(unets / FILE, MeshSpec(), True)
    for out in ranks(mesh.world_size, loop_case, unets / FILE, mesh, False):
        assert_alike(out, wanted)


@torch.inference_mode()
def recorded_case(path: Path, mesh: MeshSpec) -> int:
    plain: Predictor = predictor(path, mesh, SDXL)
    model, recorder = replace(plain), Recorder()
    model.captured = CapturedNetwork(plain.network, plain.mesh, recorder)
    rows = replace(rows_of(SIZE), extras=Extras().read(ASKED["all"], [], plain, SIZE, (0, 1)))
    wanted = plain.output(rows)
    assert all(torch.equal(model.output(rows), wanted) for _ in range(3))
    return recorder.done_again


def test_a_recording_gives_what_runs_as_ever(ranks: RankPool, unets: Path) -> None:
    assert set(ranks(2, recorded_case, unets / FILE, MeshSpec(cfg=2))) == {2}


def changed(asked: AnyExtra, **fields: Any) -> AnyExtra:
    return msgspec.structs.replace(asked, **fields)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (changed(NORMS, sources=FIRST[:3]), "3 sources came for 4 rows of shared norms"),
        (changed(NORMS, rows=[(0, 0)] * 4), "4 sources came for 4 rows"),
        (changed(PLAIN, sources=[(0, 1), *FIRST[1:]]), r"names the row \(0, 1\) as a source, which is no source"),
        (changed(PLAIN, key_weights=[1.0]), "4 rows has keys of 4 with 1 weights"),
        (changed(PLAIN, key_sources=[(1, 1)] * 4), "keys of 4 with 4 weights"),
        (changed(PLAIN, key_weights=[float("nan")] * 4), "not finite"),
    ],
)
def test_rows_that_do_not_fit_are_named(asked: AnyExtra, words: str, unets: Path) -> None:
    model: Predictor = predictor(unets / FILE, MeshSpec(), SDXL)
    with pytest.raises(InputError, match=words):
        Extras().read([asked], [], model, SIZE, (0, 1))


@torch.inference_mode()
def test_rows_of_another_evaluation_are_named(unets: Path) -> None:
    model: Predictor = predictor(unets / FILE, MeshSpec(), SDXL)
    with pytest.raises(InputError, match=r"rows of the prompts \[1\], which are not evaluated"):
        Extras().read([NORMS], [], model, SIZE, (0,))
    extras = Extras().read([PLAIN], [], model, SIZE, (0, 1))
    for which, row in ((((1, 0), (1, 2)), r"\(1, 2\)"), (((1, 1), (0, 1)), r"\(1, 1\)")):
        with pytest.raises(InputError, match=f"Shared attention has no source for the row {row}"):
            model.output(replace(rows_of(SIZE, which), extras=extras))
    with pytest.raises(InputError, match="has one token at the coarsest scale"):
        Extras().read([MATCHED], [], model, (4, 4), (0, 1))


def test_a_sampling_names_what_it_can_not_have(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / FILE, MeshSpec(dp=2), "float32")
    cond, uncond = (Conditioning(*unet_prompt(CONFIGS["tiny"], seed, tokens)) for seed, tokens in ((1, 77), (2, 154)))
    one = [SharedNorms(rows=[(0, 0), (1, 0)], sources=[(0, 0), (1, 0)])]
    with pytest.raises(UnsupportedError, match="shared norms mixes rows of both prompts"):
        model.sample(torch.zeros(2, 4, 16, 12), cond, uncond, steps=1, extras=[NORMS])
    with pytest.raises(
        UnsupportedError, match="shared norms mixes 1 latents, which 2 ranks of dp can't have shares of"
    ):
        model.sample(torch.zeros(1, 4, 16, 12), cond, cond, steps=1, extras=one)
    with pytest.raises(InputError, match=r"no source for the row \(0, 2\)"):
        model.sample(torch.zeros(3, 4, 16, 12), cond, cond, steps=1, extras=[NORMS])
