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
from parallel_backend.rpc.extras import AnyExtra, RegionalPrompts, SplitPrompt
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


class Whole:
    """A processor of a reference's cross-attention, on all tokens at once: the layer's output weighed, its projection included."""

    def __init__(self, asked: list[AnyExtra]) -> None:
        self.splits = any(isinstance(one, SplitPrompt) for one in asked)
        self.regions = next((one for one in asked if isinstance(one, RegionalPrompts)), None)

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        keys = values = encoder_hidden_states
        if self.splits:
            keys, values = keys[:, 0::2], values[:, 1::2]
        if self.regions is None:
            return self.layer(attn, x, keys, values)
        cond, uncond = (self.layer(attn, x[i : i + 1], keys[i : i + 1], values[i : i + 1]) for i in (0, 1))
        asked = self.regions
        mask = next(mask for mask in asked.masks if mask.shape[1] == x.shape[1])[..., None]
        of_own = self.layer(attn, x[:1], keys[:1] * asked.strength, values[:1] * asked.strength)
        others = zip(asked.keys, asked.values or asked.keys, mask[1:], strict=True)
        cond = mask[0] * of_own + sum(m * self.layer(attn, x[:1], k, v) for k, v, m in others)
        return torch.cat([cond, uncond])

    @staticmethod
    def layer(attn: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = attn.to_q(x), attn.to_k(keys), attn.to_v(values)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.inference_mode()
def expected(asked: list[AnyExtra]) -> Tensor:
    model, places = reference_model(), attention_places(reference_model())
    before = {place: block.attn2.processor for place, block in places.items()}
    for block in places.values():
        block.attn2.processor = Whole(asked)
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


def test_the_same_rows_are_the_same_object(unets: Path) -> None:
    made = read_extra(regions(strength=0.5), target(unets / "unet-tiny.safetensors", MeshSpec()))
    assert made.of(ROWS) is made.of(ROWS)


def test_it_travels_as_numbers_and_names() -> None:
    named = regions(split=True).each(lambda tensor: tensor.shape[1])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode([named, SplitPrompt()]), type=list[AnyExtra])
    assert again == [named, SplitPrompt()] and again[0].tensors() == [8, 12, 8, 12, 77, 24]
