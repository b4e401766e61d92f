"""Step caches beside what else a job may have, on odd sizes and batches: the latent is that of one process, and the same steps are reused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from served import NEGATIVE, POSITIVE
from test_step_cache import EQUAL, FIRST_BLOCK, SETTINGS, TEACACHE, TINY, assert_same, reused
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import Backend, Conditioning, ControlUse, MeshSpec, StepCache
from parallel_backend.config import SamplerSpec
from parallel_backend.rank.one_process import OneProcess
from parallel_backend.rpc.extras import AnyExtra, ImagePrompt, SkipBlocks
from parallel_backend.small_checkpoints.mmdit import small_config
from parallel_backend.small_checkpoints.mmdit_control import INSTANTX, STABILITY, write_control
from parallel_backend.small_checkpoints.unet_control import control_config, write_unet_control

DEEPCACHE = StepCache("deepcache", interval=2, first_steps=1)
UNEQUAL = POSITIVE, NEGATIVE
UNET = tuple(Conditioning(*unet_prompt(TINY, seed, 77)) for seed in (1, 2))
# Two latents of odd sides, which neither patches of tokens nor bands divide.
TOKENS, CELLS = torch.zeros(2, 16, 15, 13), torch.zeros(2, 4, 23, 19)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def check(
    backend: Backend,
    path: Path,
    meshes: Sequence[MeshSpec],
    cache: StepCache,
    latent: Tensor,
    prompts: Sequence[Conditioning],
    hints: dict[Path, Tensor] | None = None,
    extras: Sequence[AnyExtra] = (),
) -> None:
    """Each mesh gives one process's latent, which isn't the exact one; where both prompts are one call, or each rank has both, all
    ranks say that they reused the same steps."""
    hints, positive, negative = hints or {}, *prompts
    process = OneProcess(path)
    named = {process.load_control(file): hint for file, hint in hints.items()}
    expected, exact = (
        process.sample(latent, positive, negative, SamplerSpec(**SETTINGS, step_cache=asked), named, extras)
        for asked in (cache, None)
    )
    assert (expected - exact).abs().max() > 1e-4 * exact.abs().max(), "nothing was reused"
    for mesh in meshes:
        model = backend.load_model(path, mesh, "float32")
        controls = [ControlUse(backend.load_control(file, model), hint) for file, hint in hints.items()]
        settings: dict[str, Any] = SETTINGS | {"step_cache": cache, "controls": controls, "extras": extras}
        assert_same(model.sample(latent, positive, negative, **settings), expected)
        steps = reused(model)
        assert mesh.cfg > 1 or all(of_rank == steps[0] != [] for of_rank in steps)


@pytest.mark.parametrize(
    ("kind", "meshes"),
    [(INSTANTX, [MeshSpec(pp=2), MeshSpec(ring=2)]), (STABILITY, [MeshSpec(tp=2), MeshSpec(cfg=2), MeshSpec(dp=2)])],
)
@pytest.mark.parametrize("cache", [FIRST_BLOCK, TEACACHE], ids=lambda cache: cache.method)
def test_controlnets_of_sd3(
    cache: StepCache, kind: str, meshes: list[MeshSpec], backend2: Backend, large: Path, tmp_path: Path
) -> None:
    hints = {
        write_control(tmp_path / "control.safetensors", kind, small_config("sd3.5-large")): seeded(1, *TOKENS.shape[1:])
    }
    check(backend2, large, meshes, cache, TOKENS, UNEQUAL, hints)


def test_controlnets_of_sdxl(backend2: Backend, unets: Path, tmp_path: Path) -> None:
    """Two, of which evaluations that are reused compute what the outermost blocks take alone."""
    meshes = [MeshSpec(patch=2), MeshSpec(patch=2, sliced=True), MeshSpec(cfg=2), MeshSpec(dp=2)]
    pixels = torch.rand(1, 3, *(8 * side for side in CELLS.shape[2:]), generator=torch.Generator().manual_seed(7))
    hints = {
        write_unet_control(tmp_path / f"{seed}.safetensors", control_config(TINY), "single file", seed=seed): pixels
        for seed in (1, 2)
    }
    check(backend2, unets / "unet-tiny.safetensors", meshes, DEEPCACHE, CELLS, UNET, hints)


def test_skipped_layers(backend2: Backend, large: Path) -> None:
    """Some at all steps, and others that come to an end, after which the next evaluation is computed."""
    meshes = [MeshSpec(pp=2), MeshSpec(ulysses=2), MeshSpec(cfg=2)]
    extras = [SkipBlocks(blocks=[2]), SkipBlocks(blocks=[1], end=0.5)]
    check(backend2, large, meshes, FIRST_BLOCK, TOKENS, EQUAL, extras=extras)


def test_image_prompts(backend2: Backend, unets: Path) -> None:
    meshes = [MeshSpec(patch=2), MeshSpec(cfg=2), MeshSpec(dp=2)]
    width, tokens = TINY.block_channels[-1], 4
    picture = ImagePrompt(
        places=[("middle", 0, 0)],
        tokens=[tokens],
        rows=[(0, None), (1, None)],
        keys_values=seeded(2, 2 * tokens * width),
    )
    check(backend2, unets / "unet-tiny.safetensors", meshes, DEEPCACHE, CELLS, UNET, extras=[picture])


@pytest.fixture(scope="module")
def backend3(runtime_folder: Path) -> Iterator[Backend]:
    backend = Backend(3, "cpu", "caches3")
    yield backend
    backend.stop()


def test_three_ranks(backend3: Backend, large: Path, unets: Path) -> None:
    """With dp one of them has no latent, and decides all the same."""
    ring, stages, rows = MeshSpec(ring=3), MeshSpec(pp=3), MeshSpec(dp=3)
    check(backend3, large, [ring, stages, rows], FIRST_BLOCK, TOKENS, EQUAL)
    check(backend3, large, [stages, rows], TEACACHE, TOKENS, UNEQUAL)
    check(backend3, unets / "unet-tiny.safetensors", [MeshSpec(patch=3), rows], DEEPCACHE, CELLS, UNET)
