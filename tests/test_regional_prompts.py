"""Attention to regional prompts in bands, apart from any backend: beside plain attention over the whole latent in one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from local_network import local_network
from rank_pool import RankPool, groups
from torch import Tensor
from unet_inputs import inputs

from parallel_backend import MeshSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import Step
from parallel_backend.errors import InputError
from parallel_backend.extras.reading import read_extra
from parallel_backend.extras.target import Target
from parallel_backend.models.network import Network
from parallel_backend.models.residuals import NONE
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import AnyExtra, ImagePrompt, RegionalPrompts, SplitPrompt
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

# At the second scale 11 x 7 tokens, at the third 6 x 4.
SIZE = (2, 21, 13)
CELLS = (77, 24)
# The first row of the evaluation is of cond, the second of uncond.
ROWS = ((0, 2), (1, 2))


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def regions(*, strength: float = 1.0, split: bool = False) -> RegionalPrompts[Tensor]:
    """Two prompts beside the row's own, of other lengths; with `split` their values are of others."""
    width = CONFIGS["tiny"].context_width
    masks = [torch.rand(3, cells, generator=torch.Generator().manual_seed(cells)) for cells in CELLS]
    return RegionalPrompts(
        strength=strength,
        keys=[drawn(1, 8, width, seed=1), drawn(1, 12, width, seed=2)],
        values=[drawn(1, 8, width, seed=4), drawn(1, 12, width, seed=5)] if split else None,
        masks=[mask / mask.sum(0) for mask in masks],
    )


@cache
def reference_model() -> Any:
    return random_unet(CONFIGS["tiny"])


PICTURED = (("input", 3, 0), 77, 6), (("output", 0, 0), 24, 4)


def picture(
    rows: list[tuple[int, int | None]], regions: list[int] | None, seed: int, **form: Any
) -> ImagePrompt[Tensor]:
    """At two of the places, of other numbers of tokens, with masks."""
    widths = [int(attention_places(reference_model())[place].attn2.inner_dim) for place, *_ in PICTURED]
    values = sum(2 * width * tokens for width, (_, _, tokens) in zip(widths, PICTURED, strict=True))
    cells = sum(count for _, count, _ in PICTURED)
    return ImagePrompt(
        places=[place for place, *_ in PICTURED],
        tokens=[tokens for *_, tokens in PICTURED],
        rows=rows,
        keys_values=drawn(len(rows), values, seed=seed),
        masks=drawn(len(rows), cells, seed=seed + 1).abs(),
        regions=regions,
        **form,
    )


class Whole:
    """A processor of a reference's cross-attention, on all tokens at once: the layer's output weighed, its projection included."""

    def __init__(self, asked: list[AnyExtra], place: Any) -> None:
        numbers = [number for number, (at, *_) in enumerate(PICTURED) if at == place]
        self.number = numbers[0] if numbers else None
        self.pictures = [one for one in asked if isinstance(one, ImagePrompt)]
        self.splits = any(isinstance(one, SplitPrompt) for one in asked)
        self.regions = next((one for one in asked if isinstance(one, RegionalPrompts)), None)

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        keys = values = encoder_hidden_states
        if self.splits:
            keys, values = keys[:, 0::2], values[:, 1::2]
        if self.regions is None:
            rows = zip(x.split(1), keys.split(1), values.split(1), (0, 1), strict=True)
            return torch.cat([self.layer(attn, *row, branch, None) for *row, branch in rows])
        asked = self.regions
        uncond = self.layer(attn, x[1:], keys[1:], values[1:], 1, 0)
        mask = next(mask for mask in asked.masks if mask.shape[1] == x.shape[1])[..., None]
        of_own = self.layer(attn, x[:1], keys[:1] * asked.strength, values[:1] * asked.strength, 0, 0)
        others = enumerate(zip(asked.keys, asked.values or asked.keys, mask[1:], strict=True), 1)
        cond = mask[0] * of_own + sum(m * self.layer(attn, x[:1], k, v, 0, n) for n, (k, v, m) in others)
        return torch.cat([cond, uncond])

    def layer(self, attn: Any, x: Tensor, keys: Tensor, values: Tensor, branch: int, region: int | None) -> Tensor:
        """Of one row: what it takes from its prompt's tokens, and from the pictures for it."""
        q = attn.to_q(x)
        out = self.attend(attn, q, attn.to_k(keys), attn.to_v(values))
        theirs = [one for one in self.pictures if region in (one.regions or [None])]
        for one in theirs if self.number is not None else ():
            row = next(n for n, (of, latent) in enumerate(one.rows) if of == branch and latent in (None, 2))
            places = attention_places(reference_model())
            counts = [2 * places[p].attn2.inner_dim * t for p, t in zip(one.places, one.tokens, strict=True)]
            flat = one.keys_values[row].split(counts)[self.number].unflatten(0, (1, one.tokens[self.number], -1))
            found = self.attend(attn, q, *flat.chunk(2, dim=-1))
            if one.form == "orthogonal":
                found = found - (out * found).sum(1, keepdim=True) / (out**2).sum(1, keepdim=True) * out
            assert one.masks is not None
            out = out + found * one.masks[row].split([cells for _, cells, _ in PICTURED])[self.number][None, :, None]
        return attn.to_out[0](out)

    @staticmethod
    def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.inference_mode()
def expected(asked: list[AnyExtra]) -> Tensor:
    model, places = reference_model(), attention_places(reference_model())
    before = {place: block.attn2.processor for place, block in places.items()}
    for place, block in places.items():
        block.attn2.processor = Whole(asked, place)
    x, timesteps, context, y = inputs("tiny", SIZE)
    out = model(x, timesteps, context, class_labels=y).sample
    for place, processor in before.items():
        places[place].attn2.processor = processor
    return out


@cache
def network(path: Path, mesh: MeshSpec) -> Network:
    return local_network(path, build_mesh(mesh, groups()))


def target(path: Path, mesh: MeshSpec) -> Target:
    predictor: Any = SimpleNamespace(network=network(path, mesh), device=torch.device("cpu"), dtype=torch.float32)
    return Target(predictor, *SIZE[1:])


@torch.inference_mode()
def banded(path: Path, mesh: MeshSpec, asked: list[AnyExtra], phases: list[Any]) -> list[Tensor]:
    model = network(path, mesh)
    extras = [read_extra(one, target(path, mesh)).of(ROWS) for one in asked]
    x, timesteps, context, y = inputs("tiny", SIZE)
    kept = model.new_job(displaced=len(phases) > 1)
    steps = [replace(Step(i, phase), kept=kept) for i, phase in enumerate(phases)]
    outputs = [model(x, timesteps, model.prepare(context, y), step, NONE, extras).clone() for step in steps]
    kept.close()
    return outputs


CASES: dict[str, list[AnyExtra]] = {
    "regions": [regions()],
    "of a strength": [regions(strength=0.7)],
    "split": [SplitPrompt()],
    "split regions": [SplitPrompt(), regions(strength=1.2, split=True)],
    "a picture, split": [picture([(0, None), (1, 2)], None, 20), SplitPrompt()],
    "pictures in regions, split": [
        picture([(0, 2), (1, None)], [0], 20),
        picture([(0, None)], [1], 22, form="orthogonal"),
        picture([(0, 0), (0, 2)], [1, 2], 24),
        regions(strength=1.2, split=True),
        SplitPrompt(),
    ],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_in_bands_is_that_of_the_whole_latent(case: str, world_size: int, ranks: RankPool, unets: Path) -> None:
    path, wanted, plain = unets / "unet-tiny.safetensors", expected(CASES[case]), expected([])
    assert (wanted - plain).abs().max() > 1e-2 * plain.abs().max()
    for (out,) in ranks(world_size, banded, path, MeshSpec(patch=world_size), CASES[case], ["sync"]):
        assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_ranks_that_hold_slices_of_weights_make_the_same_of_them(ranks: RankPool, unets: Path) -> None:
    path, wanted = unets / "unet-tiny.safetensors", expected(CASES["split regions"])
    for (out,) in ranks(2, banded, path, MeshSpec(patch=2, sliced=True), CASES["split regions"], ["sync"]):
        assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_displaced_bands_have_them(ranks: RankPool, unets: Path) -> None:
    """A neighbour that sends what it sent before is as good as one that sends anew."""
    path, wanted = unets / "unet-tiny.safetensors", expected(CASES["regions"])
    for outputs in ranks(2, banded, path, MeshSpec(patch=2), CASES["regions"], ["sync", "displaced"]):
        for out in outputs:
            assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def changed(**fields: Any) -> RegionalPrompts[Tensor]:
    return msgspec.structs.replace(regions(), **fields)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (changed(keys=[torch.zeros(1, 8, 5)] * 2), r"has shape \[1, 8, 5\]; this model needs \(1, tokens, "),
        (
            changed(values=[drawn(1, 8, CONFIGS["tiny"].context_width)]),
            "keys of \\[8, 12\\] tokens and values of \\[8\\]",
        ),
        (changed(masks=[torch.full((2, 77), 0.5)]), r"have shape \[2, 77\]"),
        (changed(masks=[torch.full((3, 77), 0.5)]), "sum to 1.5 to 1.5"),
        (changed(masks=[torch.full((3, 77), float("nan"))]), "sum to nan"),
        (changed(masks=regions().masks[:1]), r"masks for \[77\] tokens, and none for 24"),
    ],
)
def test_what_does_not_fit_is_named(asked: RegionalPrompts[Tensor], words: str, unets: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_extra(asked, target(unets / "unet-tiny.safetensors", MeshSpec()))


WRONG_BESIDE = [
    ([picture([(0, None)], [1], 20)], "is for the regional prompt 1; 0 came"),
    ([picture([(0, None)], [3], 20), regions()], "is for the regional prompt 3; 3 came"),
    ([picture([(0, None)], None, 20), regions()], "beside regional prompts"),
]


@pytest.mark.parametrize(("asked", "words"), WRONG_BESIDE, ids=[words for _, words in WRONG_BESIDE])
def test_pictures_name_the_prompts_that_they_are_for(asked: list[AnyExtra], words: str, unets: Path) -> None:
    made = [read_extra(one, target(unets / "unet-tiny.safetensors", MeshSpec())) for one in asked]
    with pytest.raises(InputError, match=words):
        made[0].check_beside(made)


@pytest.mark.parametrize(("rows", "of"), [([(0, None)], []), ([(0, None)], [1, 1]), ([(0, None), (1, None)], [0, 1])])
def test_regions_of_a_picture_that_can_not_be(rows: Any, of: list[int], unets: Path) -> None:
    with pytest.raises(InputError, match=r"is for regional prompts \["):
        read_extra(picture(rows, of, 20), target(unets / "unet-tiny.safetensors", MeshSpec()))


def test_the_same_rows_are_the_same_object(unets: Path) -> None:
    made = read_extra(regions(strength=0.5), target(unets / "unet-tiny.safetensors", MeshSpec()))
    assert made.of(ROWS) is made.of(ROWS)


def test_it_travels_as_numbers_and_names() -> None:
    named = regions(split=True).each(lambda tensor: tensor.shape[1])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode([named, SplitPrompt()]), type=list[AnyExtra])
    assert again == [named, SplitPrompt()] and again[0].tensors() == [8, 12, 8, 12, 77, 24]
