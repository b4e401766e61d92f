"""Attention to pictures in bands, apart from any backend: beside plain attention over the whole latent in one process."""

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
from parallel_backend.extras.image_prompt import PromptedAttention
from parallel_backend.extras.target import Target
from parallel_backend.models.network import Network
from parallel_backend.models.residuals import NONE
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import AnyExtra, ImagePrompt
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

# At the second scale 11 x 7 tokens, at the third 6 x 4.
SIZE = (2, 21, 13)
# Two widths and two scales; the last has a picture of its own length.
PLACES = {("input", 3, 0): (8, 77), ("middle", 0, 0): (8, 24), ("output", 1, 1): (6, 24), ("output", 2, 0): (8, 77)}
# Of the two rows of the evaluation: the first is of cond, the second of uncond, and each the third latent of its batch.
ROWS = ((0, 2), (1, 2))


def prompt(form: Any = "added", *, masked: bool = False, weight: float = 1.5) -> ImagePrompt[Tensor]:
    """With a row for every latent of cond, and for two of uncond."""
    generator = torch.Generator().manual_seed(3)
    rows: list[tuple[int, int | None]] = [(0, None), (1, 1), (1, 2)]
    values = sum(2 * width(place) * tokens for place, (tokens, _) in PLACES.items())
    drawn = weight * torch.randn(len(rows), values, generator=generator)
    masks = torch.rand(len(rows), sum(cells for _, cells in PLACES.values()), generator=generator) if masked else None
    tokens = [tokens for tokens, _ in PLACES.values()]
    return ImagePrompt(places=[*PLACES], tokens=tokens, rows=rows, keys_values=drawn, masks=masks, form=form)


@cache
def reference_model() -> Any:
    return random_unet(CONFIGS["tiny"])


def width(place: tuple[str, int, int]) -> int:
    return int(attention_places(reference_model())[place].attn2.inner_dim)


class WithPictures:
    """A processor of a reference's cross-attention: as the papers have it, on all tokens at once."""

    def __init__(self, pictures: list[tuple[str, Tensor, Tensor, Tensor]]) -> None:
        self.pictures = pictures

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q = attn.to_q(x)
        out = self.attend(attn, q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        for form, k, v, mask in self.pictures:
            found = self.attend(attn, q, k, v)
            if form != "added":
                along = (out * found).sum(1, keepdim=True) / (out**2).sum(1, keepdim=True) * out
                kept = (
                    (q @ k.mT).softmax(-1)[..., :5].sum(-1).mean(1) if form == "partly_orthogonal" else torch.zeros(2)
                )
                found = found - (1 - kept[:, None, None]) * along
            out = out + found * mask[..., None]
        return attn.to_out[0](out)

    @staticmethod
    def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.inference_mode()
def expected(prompts: list[ImagePrompt[Tensor]]) -> Tensor:
    model, places = reference_model(), attention_places(reference_model())
    before = {place: places[place].attn2.processor for place in PLACES}
    chosen = [0, 2]
    for number, (place, (tokens, cells)) in enumerate(PLACES.items()):
        pictures = []
        for one in prompts:
            counts = [2 * width(p) * t for p, (t, _) in PLACES.items()]
            k, v = one.keys_values[chosen].split(counts, dim=1)[number].unflatten(1, (tokens, -1)).chunk(2, dim=-1)
            mask = torch.ones(2, cells)
            if one.masks is not None:
                mask = one.masks[chosen].split([c for _, c in PLACES.values()], dim=1)[number]
            pictures.append((one.form, k, v, mask))
        places[place].attn2.processor = WithPictures(pictures)
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
def banded(path: Path, mesh: MeshSpec, prompts: list[ImagePrompt[Tensor]], phases: list[Any]) -> list[Tensor]:
    model = network(path, mesh)
    extras = [PromptedAttention.read(one, target(path, mesh), {}).of(ROWS) for one in prompts]
    x, timesteps, context, y = inputs("tiny", SIZE)
    kept = model.new_job(displaced=len(phases) > 1)
    steps = [replace(Step(i, phase), kept=kept) for i, phase in enumerate(phases)]
    outputs = [model(x, timesteps, model.prepare(context, y), step, NONE, extras).clone() for step in steps]
    kept.close()
    return outputs


CASES = {
    "added": [prompt()],
    "masked": [prompt(masked=True)],
    "orthogonal": [prompt("orthogonal")],
    "partly orthogonal, masked": [prompt("partly_orthogonal", masked=True, weight=0.4)],
    "one after the other": [prompt(), prompt("orthogonal", masked=True), prompt(weight=0.4)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_form_in_bands_is_that_of_the_whole_latent(
    case: str, world_size: int, ranks: RankPool, unets: Path
) -> None:
    path, wanted = unets / "unet-tiny.safetensors", expected(CASES[case])
    plain = expected([])
    assert (wanted - plain).abs().max() > 1e-2 * plain.abs().max()
    for (out,) in ranks(world_size, banded, path, MeshSpec(patch=world_size), CASES[case], ["sync"]):
        assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_displaced_bands_have_what_is_added_by_token(ranks: RankPool, unets: Path) -> None:
    """A neighbour that sends what it sent before is as good as one that sends anew."""
    path, wanted = unets / "unet-tiny.safetensors", expected(CASES["masked"])
    phases = ["sync", "displaced", "displaced"]
    for outputs in ranks(2, banded, path, MeshSpec(patch=2), CASES["masked"], phases):
        for out in outputs:
            assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_only_what_is_added_by_token_is_for_displaced_steps(unets: Path) -> None:
    at = target(unets / "unet-tiny.safetensors", MeshSpec())
    by_token = {form: PromptedAttention.read(prompt(form), at, {}).by_token for form in ("added", "orthogonal")}
    assert by_token == {"added": True, "orthogonal": False}


def changed(**fields: Any) -> ImagePrompt[Tensor]:
    return msgspec.structs.replace(prompt(masked=True), **fields)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (changed(places=[("input", 1, 0), *list(PLACES)[1:]]), "Transformer block input 1 0 is named"),
        (changed(keys_values=torch.zeros(3, 640)), r"keys and values have shape \[3, 640\]"),
        (changed(masks=torch.zeros(3, 203)), r"masks have shape \[3, 203\]; .* it is \[3, 202\]"),
        (changed(tokens=[8]), "Counts of tokens \\[8\\] came for 4 places"),
    ],
)
def test_what_does_not_fit_is_named_by_size(asked: ImagePrompt[Tensor], words: str, unets: Path) -> None:
    with pytest.raises(InputError, match=words):
        PromptedAttention.read(asked, target(unets / "unet-tiny.safetensors", MeshSpec()), {})


def test_a_branch_that_nothing_came_for_is_named(unets: Path) -> None:
    made = PromptedAttention.read(prompt(), target(unets / "unet-tiny.safetensors", MeshSpec()), {})
    made.check([0, 1])
    with pytest.raises(InputError, match="without keys and values of branch 2"):
        made.check([0, 2])


def test_the_same_rows_are_the_same_object_and_hold_no_copy(unets: Path) -> None:
    """As graphs of evaluations need them, which read from where they lie."""
    of_all = msgspec.structs.replace(prompt(), rows=[(0, None), (1, None), (2, None)])
    made = PromptedAttention.read(of_all, target(unets / "unet-tiny.safetensors", MeshSpec()), {})
    assert made.of(ROWS) is made.of(ROWS)
    three = made.of(((0, 0), (1, 0), (2, 0)))
    assert three.keys_values.data_ptr() == made.keys_values.data_ptr()


def test_it_travels_as_numbers_and_names() -> None:
    named = prompt(masked=True).each(lambda tensor: tensor.shape[1])
    again = msgspec.msgpack.decode(msgspec.msgpack.encode([named]), type=list[AnyExtra])
    assert again == [named] and named.tensors() == [named.keys_values, 202]
