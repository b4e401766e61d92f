"""PLADIS, shuffled tokens and FreeU at all places in bands, apart from any backend: beside plain formulas in diffusers' model, whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rank_pool import RankPool
from test_extras import SDXL, predictor, seeded
from torch import Tensor
from unet_inputs import inputs, unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel
from parallel_backend.errors import InputError, UnsupportedError
from parallel_backend.extras.reading import Extras
from parallel_backend.extras.sparse_attention import entmax15, sparsemax
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.models.unet import attention_places
from parallel_backend.rpc.extras import AnyExtra, Downscale, FreeU, ShuffledTokens, SparseAttention
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet

pytestmark = pytest.mark.busy

FILE = "unet-tiny.safetensors"
# At the second scale 11 x 7 tokens, at the third 6 x 4.
SIZE = (2, 21, 13)
FINE, COARSE, MIDDLE = ("input", 3, 0), ("output", 1, 0), ("middle", 0, 0)
CELLS = {FINE: 77, COARSE: 24, MIDDLE: 24}
MESHES = [*(MeshSpec(patch=degree) for degree in (1, 2, 3, 4)), MeshSpec(patch=2, sliced=True), MeshSpec(dp=2)]


def bisected(power: float, scores: Tensor) -> Tensor:
    """Shares (scores * (power - 1) - threshold) ** (1 / (power - 1)) that sum to 1, by halving where the threshold can lie."""
    z = scores.double() * (power - 1)
    least, most = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(60):
        threshold = (least + most) / 2
        is_low = ((z - threshold).clamp(min=0) ** (1 / (power - 1))).sum(-1, keepdim=True) >= 1
        least, most = torch.where(is_low, threshold, least), torch.where(is_low, most, threshold)
    return (z - least).clamp(min=0) ** (1 / (power - 1))


@pytest.mark.parametrize(("found", "power"), [(sparsemax, 2.0), (entmax15, 1.5)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_sparse_maps_are_those_of_their_definition(found: Any, power: float, scale: float) -> None:
    scores = torch.cat([seeded(3, 4, 77, seed=2) * scale, torch.zeros(3, 1, 77)], dim=1)
    shares = found(scores)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(shares, bisected(power, scores).float(), rtol=0, atol=1e-5)


class Sparse:
    """diffusers' attention to the prompt, its scores by the definition."""

    def __init__(self, asked: SparseAttention) -> None:
        self.asked = asked

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, k, v = attn.to_q(x), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        sparse = bisected({"sparsemax": 2.0, "entmax1.5": 1.5}[self.asked.sparse], scores).float()
        shares = self.asked.scale * sparse + (1 - self.asked.scale) * scores.softmax(-1)
        return attn.to_out[0]((shares @ v).transpose(1, 2).flatten(2))


def order_of(place: Any, seed: int = 1) -> Tensor:
    return torch.randperm(CELLS[place], generator=torch.Generator().manual_seed(seed))


def shuffled(*places: Any) -> ShuffledTokens[Tensor]:
    return ShuffledTokens(places=list(places), orders=torch.cat([order_of(place) for place in places]))


CASES: dict[str, list[AnyExtra]] = {
    "entmax": [SparseAttention(places=[FINE, MIDDLE], scale=2.0, sparse="entmax1.5")],
    "sparsemax": [SparseAttention(places=[COARSE], scale=0.7, sparse="sparsemax")],
    "shuffled": [shuffled(FINE, MIDDLE)],
    "shuffled, beside sparse": [shuffled(COARSE), SparseAttention(places=[COARSE], scale=1.5, sparse="entmax1.5")],
}


@cache
@torch.inference_mode()
def expected(case: str) -> Tensor:
    model = random_unet(CONFIGS["tiny"])
    x, timesteps, context, y = inputs("tiny", SIZE)
    for asked in CASES.get(case, []):
        for place in asked.places:  # type: ignore[union-attr]
            block = attention_places(model)[place]
            if isinstance(asked, SparseAttention):
                block.attn2.processor = Sparse(asked)  # type: ignore[assignment]
            else:
                block.register_forward_pre_hook(partial(_shuffle, order_of(place)))
    return model(x, timesteps, context, class_labels=y).sample  # type: ignore[no-any-return]


def _shuffle(order: Tensor, block: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0][:, order], *inputs[1:])


@torch.inference_mode()
def output_case(path: Path, mesh: MeshSpec, asked: Sequence[AnyExtra], size: tuple[int, int, int] = SIZE) -> Tensor:
    model, (x, timesteps, context, y) = predictor(path, mesh, SDXL), inputs("tiny", size)
    tensors = [tensor for one in asked for tensor in one.tensors()]
    places = iter(range(len(tensors)))
    named = [one.each(lambda _: next(places)) for one in asked]
    acting = Extras().read(named, tensors, model, size[1:], (0,))
    rows = Rows(x, timesteps, Prompt(context, y), extras=acting, which=tuple((0, i) for i in range(size[0])))
    return model.output(rows)


@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
@pytest.mark.parametrize("case", CASES)
def test_in_bands_each_is_that_of_the_whole_latent(case: str, mesh: MeshSpec, ranks: RankPool, unets: Path) -> None:
    wanted, plain = expected(case), expected("none")
    assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max()
    for out in ranks(mesh.world_size, output_case, unets / FILE, mesh, CASES[case]):
        assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_a_latent_too_small_for_bands_is_shuffled_whole(ranks: RankPool, unets: Path) -> None:
    size = (1, 6, 4)  # 3 x 2 tokens at the second scale
    asked = [ShuffledTokens(places=[FINE], orders=torch.tensor([4, 0, 5, 2, 1, 3]))]
    (wanted,) = ranks(1, output_case, unets / FILE, MeshSpec(), asked, size)
    (plain,) = ranks(1, output_case, unets / FILE, MeshSpec(), [], size)
    assert not torch.allclose(wanted, plain)
    for out in ranks(3, output_case, unets / FILE, MeshSpec(patch=3), asked, size):
        assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.fixture(scope="module")
def model(backend2: Backend, unets: Path) -> RemoteModel:
    return backend2.load_model(str(unets / FILE), MeshSpec(patch=2), "float32")


LATENT, PROMPT = torch.zeros(1, 4, *SIZE[1:]), Conditioning(*unet_prompt(CONFIGS["tiny"], 1))
ORDER = order_of(MIDDLE)
WRONG: list[tuple[AnyExtra, str]] = [
    (SparseAttention(places=[("input", 99, 0)], scale=2.0, sparse="sparsemax"), "Transformer block input 99 0"),
    (msgspec.structs.replace(CASES["entmax"][0], sparse="softmax"), "no map 'softmax'"),
    (ShuffledTokens(places=[MIDDLE], orders=ORDER[1:]), r"order of \[23\] tokens came as torch.int64"),
    (ShuffledTokens(places=[MIDDLE], orders=ORDER.float()), "came as torch.float32"),
    (ShuffledTokens(places=[MIDDLE], orders=ORDER.clamp(min=1)), "doesn't name each of the 24 once"),
    (ShuffledTokens(places=[("middle", 1, 0)], orders=ORDER), "Transformer block middle 1 0"),
    (FreeU(factors=[(128, 1.0, 0.5)], by_structure=True, cycles=0), "0 cycles"),
    (FreeU(factors=[(128, 1.0, 0.5)], by_structure=True, cycles=50), "50 cycles"),
    (FreeU(factors=[(128, 1.0, 0.5)], by_structure=True, scaled=[129]), r"multiply \[129\] channels of \[128\]"),
    (FreeU(factors=[(128, 1.0, 0.5)], by_structure=True, scaled=[]), r"multiply \[\] channels"),
]


@pytest.mark.parametrize(("asked", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_does_not_fit_is_named_before_the_first_step(asked: AnyExtra, words: str, model: RemoteModel) -> None:
    steps: list[Any] = []
    with pytest.raises(InputError, match=words):
        model.sample(LATENT, PROMPT, PROMPT, steps=2, extras=[asked], on_step=steps.append)
    assert not steps


def test_shuffled_tokens_are_refused_where_they_can_not_be(model: RemoteModel) -> None:
    with pytest.raises(UnsupportedError, match="shuffled tokens can't be honoured beside deep shrink"):
        shrink = Downscale(block=2, factor=2.0, after_skip=True, method="bilinear", back="bilinear")
        model.sample(LATENT, PROMPT, PROMPT, steps=2, extras=[shuffled(MIDDLE), shrink])
    with pytest.raises(UnsupportedError, match="honour shuffled tokens"):
        model.sample(LATENT, PROMPT, PROMPT, steps=4, warmup_steps=1, extras=[shuffled(MIDDLE)])


def test_displaced_steps_have_sparse_attention(model: RemoteModel) -> None:
    found = model.sample(LATENT, PROMPT, PROMPT, steps=4, warmup_steps=1, extras=CASES["entmax"])
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, model.sample(LATENT, PROMPT, PROMPT, steps=4, warmup_steps=1))
