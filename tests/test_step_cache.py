"""Step caches on real ranks: the same evaluations are reused on every mesh, and the latent is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served import EMPTY, NEGATIVE, POSITIVE
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel, StepCache
from parallel_backend.config import SamplerSpec
from parallel_backend.errors import CancelledError, ConfigError
from parallel_backend.rank.one_process import OneProcess
from parallel_backend.small_checkpoints.unet import CONFIGS

FIRST_BLOCK = StepCache("first_block", threshold=0.7, first_steps=1)
TEACACHE = StepCache("teacache", threshold=1.0, first_steps=1)
DEEPCACHE = StepCache("deepcache", interval=3, first_steps=1)
SETTINGS: dict[str, Any] = {"steps": 8, "seed": 3, "cfg_scale": 4.0}
# Longer than the other, so that both are calls of their own; and of equal length, so that they are one call.
UNEQUAL = POSITIVE, NEGATIVE
EQUAL = POSITIVE, Conditioning(POSITIVE.context.flip(1), POSITIVE.pooled.flip(1))
TINY = CONFIGS["tiny"]
UNET = tuple(Conditioning(*unet_prompt(TINY, seed, 77)) for seed in (1, 2))
FOUR = [
    MeshSpec(cfg=2, pp=2),
    MeshSpec(ring=2, ulysses=2),
    MeshSpec(dp=2, tp=2),
    MeshSpec(pp=4),
    MeshSpec(dp=2, cfg=2),
]


def sampled(model: RemoteModel, prompts: tuple[Conditioning, Conditioning], cache: StepCache, **changes: Any) -> Tensor:
    return model.sample(EMPTY, *prompts, **SETTINGS | {"step_cache": cache} | changes)


def reused(model: RemoteModel) -> list[list[int]]:
    """By rank, of the last job."""
    assert model.last is not None
    return [rank.reused for rank in model.last.ranks]


def alone(path: Path, latent: Tensor, prompts: tuple[Conditioning, Conditioning], cache: StepCache | None) -> Tensor:
    return OneProcess(path).sample(latent, *prompts, SamplerSpec(**SETTINGS, step_cache=cache))


def assert_same(out: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all()
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def checkpoint(models: Path) -> Path:
    return models / "diffusion_models" / "sd3.5-medium.safetensors"


@pytest.mark.parametrize("prompts", [UNEQUAL, EQUAL], ids=["two calls", "one call"])
@pytest.mark.parametrize("cache", [FIRST_BLOCK, TEACACHE], ids=lambda cache: cache.method)
def test_all_meshes_reuse_what_one_process_does(
    cache: StepCache, prompts: tuple[Conditioning, Conditioning], backend2: Backend, checkpoint: Path
) -> None:
    expected, exact = (alone(checkpoint, EMPTY, prompts, asked) for asked in (cache, None))
    assert (expected - exact).abs().max() > 1e-4 * exact.abs().max(), "nothing was reused"
    for mesh in MeshSpec.all_of(2):
        if mesh.patch > 1:
            continue
        model = backend2.load_model(checkpoint, mesh, "float32")
        assert_same(sampled(model, prompts, cache), expected)
        together = mesh.cfg == 1 or prompts is EQUAL
        assert not together or all(steps == reused(model)[0] != [] for steps in reused(model))


@pytest.mark.parametrize("mesh", FOUR, ids=MeshSpec.describe)
def test_four_ranks_do_too(mesh: MeshSpec, backend4: Backend, checkpoint: Path) -> None:
    model = backend4.load_model(checkpoint, mesh, "float32")
    assert_same(sampled(model, EQUAL, FIRST_BLOCK), alone(checkpoint, EMPTY, EQUAL, FIRST_BLOCK))
    assert all(steps == reused(model)[0] != [] for steps in reused(model))


def test_a_unet_in_bands_reuses_its_deeper_levels(backend2: Backend, unets: Path) -> None:
    path, latent = unets / "unet-tiny.safetensors", torch.zeros(1, 4, 23, 20)
    expected, exact = (alone(path, latent, UNET, asked) for asked in (DEEPCACHE, None))
    assert (expected - exact).abs().max() > 1e-4 * exact.abs().max()
    for mesh in (MeshSpec(patch=2), MeshSpec(patch=2, sliced=True), MeshSpec(cfg=2), MeshSpec(dp=2)):
        model = backend2.load_model(path, mesh, "float32")
        out = model.sample(latent, *UNET, **SETTINGS, step_cache=DEEPCACHE)
        assert_same(out, expected)
        assert reused(model) == [[1, 2, 4, 5]] * 2
        assert "step cache (deepcache): 4 of 8 evaluations reused" in model.note


def test_nothing_reused_is_exact_to_the_last_bit(backend2: Backend, checkpoint: Path, unets: Path) -> None:
    model = backend2.load_model(checkpoint, MeshSpec(ulysses=2), "float32")
    exact = model.sample(EMPTY, *EQUAL, **SETTINGS)
    for method in ("first_block", "teacache"):
        assert torch.equal(sampled(model, EQUAL, StepCache(method, threshold=0.0, first_steps=0)), exact)
        assert model.note == f"step cache ({method}): 0 of 8 evaluations reused"
    unet, latent = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32"), EMPTY[:, :4]
    exact = unet.sample(latent, *UNET, **SETTINGS)
    assert torch.equal(unet.sample(latent, *UNET, **SETTINGS, step_cache=StepCache("deepcache", interval=1)), exact)


def test_auto_is_the_first_that_the_model_knows(backend2: Backend, checkpoint: Path, unets: Path) -> None:
    mmdit = backend2.load_model(checkpoint, MeshSpec(tp=2), "float32")
    usual = StepCache(threshold=FIRST_BLOCK.threshold, first_steps=1)
    assert torch.equal(sampled(mmdit, EQUAL, usual), sampled(mmdit, EQUAL, FIRST_BLOCK))
    assert mmdit.note.startswith("step cache (first_block): ")
    unet = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")
    unet.sample(EMPTY[:, :4], *UNET, **SETTINGS, step_cache=StepCache(interval=3, first_steps=1))
    assert unet.note == "step cache (deepcache): 4 of 8 evaluations reused"


@pytest.mark.parametrize(("prompts", "parts"), [(EQUAL, 1), (UNEQUAL, 2)], ids=["one call", "two calls"])
def test_what_decisions_send_is_told(
    prompts: tuple[Conditioning, Conditioning], parts: int, backend2: Backend, checkpoint: Path
) -> None:
    """By each part two numbers of 8 bytes for each; nothing in steps that are computed in any case."""
    model = backend2.load_model(checkpoint, MeshSpec(ulysses=2), "float32")

    def sent(cache: StepCache | None) -> list[tuple[str, int]]:
        model.sample(EMPTY, *prompts, **SETTINGS, step_cache=cache, trace=True)
        assert model.last is not None and model.timeline is not None
        for number, rank in enumerate(model.last.ranks):
            marks = model.timeline[(model.timeline[:, 0] == number) & (model.timeline[:, 1] < 0)]
            assert marks[:, -1].sum() == sum(cost.sent_bytes for cost in rank.costs)
        return [(cost.axis, cost.sent_bytes) for cost in model.last.costs]

    never, always = (StepCache("first_block", threshold=t, first_steps=2, last_steps=1) for t in (0.0, 1e9))
    ((axis, exact),) = sent(None)
    decisions = 5 * parts * 16 * parts  # of 8 steps, of which the first two and the last are computed
    assert sent(never) == [(axis, exact), ("everyone", decisions)]
    (_, reusing), decided = sent(always)
    assert reusing < 0.6 * exact and decided == ("everyone", decisions)


def test_a_cancelled_job_leaves_nothing_to_the_next(backend2: Backend, checkpoint: Path) -> None:
    model = backend2.load_model(checkpoint, MeshSpec(pp=2), "float32")
    expected, seen = sampled(model, EQUAL, FIRST_BLOCK), []
    with pytest.raises(CancelledError):
        sampled(model, EQUAL, FIRST_BLOCK, seed=9, steps=40, on_step=seen.append, should_cancel=lambda: len(seen) > 3)
    assert torch.equal(sampled(model, EQUAL, FIRST_BLOCK), expected)


def test_what_can_not_be_is_named(backend2: Backend, checkpoint: Path, unets: Path) -> None:
    for settings, named in (
        ({"method": "easycache"}, "easycache"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"interval": 0}, "interval=0"),
        ({"last_steps": -1}, "last_steps=-1"),
    ):
        with pytest.raises(ConfigError, match=named):
            StepCache(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Displaced steps and a step cache"):
        SamplerSpec(warmup_steps=2, step_cache=FIRST_BLOCK)
    with pytest.raises(ConfigError, match="dpm_adaptive chooses its own steps"):
        SamplerSpec(sampler="dpm_adaptive", step_cache=FIRST_BLOCK)
    with pytest.raises(ConfigError, match="deepcache is not for sd3"):
        sampled(backend2.load_model(checkpoint, MeshSpec(cfg=2), "float32"), EQUAL, DEEPCACHE)
    unet = backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(patch=2), "float32")
    with pytest.raises(ConfigError, match="first_block is not for sdxl"):
        unet.sample(EMPTY[:, :4], *UNET, **SETTINGS, step_cache=FIRST_BLOCK)
