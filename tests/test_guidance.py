"""Guidance beside classifier-free guidance: its formulas beside plain torch, and as Python users ask for it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel_backend import (
    APG,
    AwayFromWeaker,
    Backend,
    Conditioning,
    MeshSpec,
    PerpNeg,
    RemoteModel,
    StepCache,
    WeakerModel,
)
from parallel_backend.client.guidance import settings_of
from parallel_backend.config import SamplerSpec
from parallel_backend.errors import BackendError, ConfigError, UnsupportedError
from parallel_backend.rpc.extras import SkipBlocks
from parallel_backend.sampling.guidance import Guidance
from parallel_backend.sampling.parameterization import Flow
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

SIGMA = torch.tensor(0.5)


def denoised(seed: int) -> Tensor:
    return torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(seed))


def outputs_for(x: Tensor, sigma: Tensor, *wanted: Tensor) -> list[Tensor]:
    """What a flow model gives for these denoised latents."""
    return [(x - latent) / sigma for latent in wanted]


def guided(guidance: Guidance, *wanted: Tensor, sigma: Tensor = SIGMA) -> Tensor:
    x = denoised(9)
    return guidance(x, sigma, outputs_for(x, sigma, *wanted))


def projected(guidance: Tensor, cond: Tensor, uncond: Tensor, settings: APG, cfg: float) -> Tensor:
    """Row by row, in plain numbers."""
    rows = []
    for g, c, u in zip(guidance, cond, uncond, strict=True):
        length = g.flatten().norm()
        if settings.norm_threshold and length > settings.norm_threshold:
            g = g * settings.norm_threshold / length
        along = (g.flatten() @ c.flatten()) / (c.flatten() @ c.flatten()) * c
        changed = u + (g - along) + settings.eta * along + (c - u) / cfg
        rows.append(u + cfg * (changed - u))
    return torch.stack(rows)


@pytest.mark.parametrize("settings", [APG(), APG(0.3, 2.0), APG(-1.0, 0.0)], ids=str)
def test_projected_guidance_is_the_papers(settings: APG) -> None:
    cond, uncond = denoised(1), denoised(2)
    found = guided(Guidance(SamplerSpec(cfg_scale=4.0, apg=settings), Flow()), cond, uncond)
    torch.testing.assert_close(found, projected(cond - uncond, cond, uncond, settings, 4.0), rtol=1e-5, atol=1e-5)


def test_momentum_sums_guidance_until_sigma_rises() -> None:
    settings = APG(0.5, 3.0, -0.7)
    guidance = Guidance(SamplerSpec(cfg_scale=4.0, apg=settings), Flow())
    total = torch.zeros(())
    for number, sigma in enumerate((0.9, 0.6, 0.6, 0.8, 0.3)):
        cond, uncond = denoised(number), denoised(number + 20)
        total = cond - uncond + (0 if sigma == 0.8 else settings.momentum * total)
        found = guided(guidance, cond, uncond, sigma=torch.tensor(sigma))
        torch.testing.assert_close(found, projected(total, cond, uncond, settings, 4.0), rtol=1e-4, atol=1e-4)


def test_without_guidance_nothing_is_projected() -> None:
    guidance = Guidance(SamplerSpec(cfg_scale=1.0, apg=APG(0.0)), Flow())
    torch.testing.assert_close(guided(guidance, denoised(1)), denoised(1))


def test_perp_neg_takes_away_what_is_across_the_whole_batchs_positive() -> None:
    cond, uncond, empty = (denoised(seed) for seed in (1, 2, 3))
    positive, negative = (cond - empty).flatten(), (uncond - empty).flatten()
    across = negative - (negative @ positive) / (positive @ positive) * positive
    expected = empty + 4.0 * (positive - 0.7 * across).reshape(empty.shape)
    spec = SamplerSpec(cfg_scale=4.0, neg_scale=0.7)
    found = guided(Guidance(spec, Flow(), ("cond", "uncond", "empty")), cond, uncond, empty)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_weaker_model_is_led_away_from() -> None:
    cond, uncond, weaker = (denoised(seed) for seed in (1, 2, 3))
    plain = uncond + 4.0 * (cond - uncond) + 2.0 * (cond - weaker)
    factor = 0.4 * cond.std() / plain.std() + 0.6
    spec = SamplerSpec(cfg_scale=4.0, weaker=AwayFromWeaker(2.0, rescale=0.4))
    names = ("cond", "uncond", "weaker")
    torch.testing.assert_close(
        guided(Guidance(spec, Flow(), names), cond, uncond, weaker), plain * factor, rtol=1e-5, atol=1e-5
    )
    # Outside its sigmas it isn't evaluated.
    found = guided(Guidance(spec, Flow(), names), cond, uncond)
    torch.testing.assert_close(found, uncond + 4.0 * (cond - uncond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: APG(eta=float("nan")), "eta=nan"),
        (lambda: APG(norm_threshold=-1.0), "norm_threshold=-1.0"),
        (lambda: APG(momentum=float("inf")), "momentum=inf"),
        (lambda: AwayFromWeaker(scale=0.0), "scale=0.0"),
        (lambda: AwayFromWeaker(rescale=float("nan")), "rescale=nan"),
        (lambda: SamplerSpec(neg_scale=float("inf")), "neg_scale=inf"),
        (lambda: SamplerSpec(cfg_scale=0.0, apg=APG()), "cfg_scale=0"),
        (lambda: SamplerSpec(neg_scale=1.0, rescale_cfg=0.5), "rescale_cfg=0.5"),
    ],
)
def test_numbers_that_cant_be_are_named(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value) and caught.value.remedy


# -- in ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(models: Path) -> Path:
    return write_mmdit(models / "diffusion_models" / "guided.safetensors", small_config("sd3.5-medium", depth=3))


def prompts(empty_tokens: int = 20) -> tuple[Conditioning, Conditioning, Conditioning]:
    return tuple(Conditioning(*random_prompt(seed, tokens)) for seed, tokens in ((1, 20), (2, 20), (3, empty_tokens)))  # type: ignore[return-value]


def sampled(backend: Backend, path: Path, mesh: MeshSpec, *, empty_tokens: int = 20, **settings: Any) -> Tensor:
    positive, negative, empty = prompts(empty_tokens)
    if "neg_scale" in settings:
        settings["perp_neg"] = PerpNeg(empty, settings.pop("neg_scale"))
    given = {"steps": 3, "seed": 1, "cfg_scale": 4.0} | settings
    return backend.load_model(path, mesh, "float32").sample(torch.zeros(2, 16, 8, 6), positive, negative, **given)


WEAKER = WeakerModel([SkipBlocks(blocks=[1])], AwayFromWeaker(2.0, 0.9, 0.3))
ASKED: list[dict[str, Any]] = [
    {"apg": APG(momentum=-0.5), "sampler": "heun"},
    {"neg_scale": 0.7},
    {"neg_scale": 0.7, "empty_tokens": 12},
    {"neg_scale": 0.0},
    {"weaker": WEAKER},
    {"weaker": WEAKER, "cfg_scale": 1.0},
    {"uncond_extras": [SkipBlocks(blocks=[1])]},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: ", ".join(asked))
def test_two_ranks_of_cfg_give_the_latent_of_tp(asked: dict[str, Any], backend2: Backend, checkpoint: Path) -> None:
    latents = [sampled(backend2, checkpoint, mesh, **dict(asked)) for mesh in (MeshSpec(cfg=2), MeshSpec(tp=2))]
    plain = sampled(backend2, checkpoint, MeshSpec(cfg=2), cfg_scale=asked.get("cfg_scale", 4.0))
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-4)
    assert (latents[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("mesh", "asked", "kind", "words"),
    [
        (MeshSpec(pp=2), {"apg": APG(), "warmup_steps": 1}, UnsupportedError, "APG needs the length"),
        (MeshSpec(pp=2), {"neg_scale": 1.0, "warmup_steps": 1}, UnsupportedError, "Perp-Neg needs sums"),
        (MeshSpec(ring=2), {"weaker": WEAKER, "warmup_steps": 1}, UnsupportedError, "can't evaluate a weaker model"),
        (MeshSpec(cfg=2), {"weaker": WeakerModel([], AwayFromWeaker())}, ConfigError, "nothing that makes it weaker"),
    ],
)
def test_what_cant_be_had_is_named(
    mesh: MeshSpec, asked: dict[str, Any], kind: type[BackendError], words: str, backend2: Backend, checkpoint: Path
) -> None:
    with pytest.raises(kind, match=words):
        sampled(backend2, checkpoint, mesh, **asked)


def test_perp_neg_needs_a_negative_prompt(backend2: Backend, checkpoint: Path) -> None:
    positive, _, empty = prompts()
    model = backend2.load_model(checkpoint, MeshSpec(cfg=2), "float32")
    with pytest.raises(ConfigError, match="a positive, a negative and an empty prompt"):
        model.sample(torch.zeros(1, 16, 8, 6), positive, perp_neg=PerpNeg(empty))


def test_a_specs_settings_are_those_of_a_sampling() -> None:
    spec = SamplerSpec(steps=3, cfg_scale=2.0, apg=APG(), step_cache=StepCache("first_block"))
    assert set(settings_of(spec)) <= set(inspect.signature(RemoteModel.sample).parameters)
    assert SamplerSpec(**settings_of(spec)) == spec
    for beside in ({"neg_scale": 1.0}, {"weaker": AwayFromWeaker()}):
        with pytest.raises(ValueError, match="more than a spec"):
            settings_of(SamplerSpec(**beside))
