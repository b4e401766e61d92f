"""NaN and infinity through the Python client: what comes back, what is told of it, and a VAE that leaves float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from served import EMPTY, NEGATIVE, POSITIVE, sample
from torch import Tensor

from parallel_backend import Backend, Conditioning, RemoteModel
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.client.not_finite import is_finite
from parallel_backend.config import MeshSpec, SamplerSpec
from parallel_backend.distributed.control import Control
from parallel_backend.errors import NotFiniteError
from parallel_backend.models.prediction import Predictor
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Loaded, LoadModel, Prompt, Result, Sample
from parallel_backend.rpc.state import RankCost
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.small_checkpoints.prompts import random_prompt

NAN = float("nan")


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.flatten()[5] = NAN
    return x


def test_a_sampling_of_nan_is_told_with_its_step_and_the_next_is_as_before(
    model: RemoteModel, expected: Tensor
) -> None:
    prompt = Conditioning(with_nan(POSITIVE.context), POSITIVE.pooled)
    for latent, positive, words in ((with_nan(EMPTY), POSITIVE, "The latent"), (EMPTY, prompt, "The positive cond")):
        assert torch.isnan(model.sample(latent, positive, NEGATIVE, steps=3)).all()
        assert model.note.startswith(words) and " from step 1 of " in model.note
    pooled = Conditioning(NEGATIVE.context, with_nan(NEGATIVE.pooled))
    model.nan_is_error = True
    try:
        with pytest.raises(NotFiniteError, match="The negative pooled conditioning that came in holds"):
            model.sample(EMPTY, POSITIVE, pooled)
    finally:
        model.nan_is_error = False
    assert torch.equal(sample(model), expected) and not model.note


@pytest.mark.parametrize(("sampler", "evaluation", "step"), [("euler", 5, 2), ("heun", 7, 1)])
def test_the_step_at_which_the_model_began_is_known(
    sampler: str, evaluation: int, step: int, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `heun`, two evaluations a step; cond and uncond are outputs of one."""
    engine, job = Engine(torch.device("cpu")), Job(Control(), lambda body, tensors: None, lambda: False)
    load = LoadModel(str(large), content_key(large), "float32", MeshSpec())
    loaded, _ = engine.handle(RequestHeader(1, load), [], job)
    assert isinstance(loaded, Loaded)
    own, calls = Predictor.outputs, []

    def outputs(*args: object) -> list[Tensor]:
        calls.append(1)
        found = own(*args)  # type: ignore[arg-type]
        return [out * NAN for out in found] if 2 * len(calls) == evaluation + 1 else found

    monkeypatch.setattr(Predictor, "outputs", outputs)
    tensors = [torch.zeros(1, 16, 8, 8), *random_prompt(1, 77)]
    body = Sample(loaded.model, SamplerSpec(sampler, steps=4), 0, Prompt(1, 2), Prompt(1, 2))
    reply, (out,) = engine.handle(RequestHeader(2, body, [tensor_meta(x) for x in tensors]), tensors, job)
    assert isinstance(reply, Result) and reply.bad_step == step and torch.isnan(out).all()


@pytest.mark.parametrize(
    ("x", "finite"),
    [
        (torch.full((9,), 60000.0, dtype=torch.float16), True),  # whose sum float16 has no number for
        (torch.tensor([1.0, NAN]), False),
        (torch.tensor([float("inf"), -float("inf")]), False),
        (torch.zeros(0), True),
    ],
    ids=str,
)
def test_a_sum_tells_of_nan_and_infinity(x: Tensor, finite: bool) -> None:
    assert is_finite(x) == finite


def overflowing(models: Path, folder: Path) -> Path:
    """SDXL's VAE with activations beyond float16's range in its decoder and encoder, as the real one has."""
    weights = load_file(models / "vae" / "sdxl_vae.safetensors")
    for name in ("decoder.conv_in", "encoder.conv_in"):
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * 3e6
    path = folder / "overflowing.safetensors"
    save_file(weights, path)
    return path


def test_a_vae_that_overflows_in_float16_leaves_it_and_says_so(models: Path, tmp_path: Path, backend2: Backend) -> None:
    path, latent, image = overflowing(models, tmp_path), torch.ones(1, 4, 6, 4), torch.full((1, 48, 32, 3), 0.7)
    exact = backend2.load_vae(path, "float32")
    for request, x in (("decode", latent), ("encode", image)):
        vae = backend2.load_vae(path, "float16")
        half = vae.name
        out = getattr(vae, request)(x)
        assert torch.equal(out, getattr(exact, request)(x)) and is_finite(out)
        assert vae.note.startswith("overflowing.safetensors overflows in float16") and "float32" in vae.note
        held = [model.model for model in backend2.status().models]
        assert vae.name in held and half not in held
        getattr(vae, request)(x)
        assert not vae.note
    vae.decode(with_nan(latent))
    assert "The latent that came in holds NaN" in vae.note


def test_a_vae_that_fits_float16_stays_in_it(models: Path, backend2: Backend) -> None:
    vae = backend2.load_vae(models / "vae" / "sdxl_vae.safetensors", "float16")
    vae.decode(with_nan(torch.ones(1, 4, 6, 4)))  # which no other dtype would help
    assert vae.load.dtype == "float16" and "so does the result" in vae.note  # type: ignore[union-attr]
    exact = backend2.load_vae(models / "vae" / "sdxl_vae.safetensors", "float32")
    latent = torch.linspace(-1, 1, 4 * 24).view(1, 4, 6, 4)
    torch.testing.assert_close(vae.decode(latent), exact.decode(latent), rtol=0, atol=0.02)
    assert vae.load.dtype == "float16" and not vae.note  # type: ignore[union-attr]


def test_what_an_image_has_beyond_whole_cells_is_cut_off_at_both_ends(models: Path, backend2: Backend) -> None:
    vae = backend2.load_vae(models / "vae" / "sd3_vae.safetensors", "float32")
    image = torch.rand(1, 37, 26, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(vae.encode(image), vae.encode(image[:, 2:34, 1:25]))


def test_what_ranks_tell_stands_beside_what_is_not_finite(model: RemoteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model.backend.request

    def request(*args: Any, **more: Any) -> Any:
        reply, tensors = own(*args, **more)
        if isinstance(reply, Result):
            reply = msgspec.structs.replace(reply, ranks=[RankCost([], notes=["a rank's word"])])
        return reply, tensors

    monkeypatch.setattr(model.backend, "request", request)
    x, times = EMPTY, torch.tensor([500.0])
    model.forward(x, times, POSITIVE.context, POSITIVE.pooled)
    assert model.note == "a rank's word" and not model.not_finite
    model.forward(with_nan(x), times, POSITIVE.context, POSITIVE.pooled)
    assert model.not_finite and model.note == f"a rank's word\n{model.not_finite}"
    model.forward(x, times, POSITIVE.context, POSITIVE.pooled)
    assert model.note == "a rank's word" and not model.not_finite
