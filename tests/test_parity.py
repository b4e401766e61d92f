"""Every exact mesh, family and shape against diffusers in one process: the table that the README points to."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from reference_models import diffusers_mmdit, diffusers_velocity
from safetensors.torch import load_file
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.errors import InputError
from parallel_backend.small_checkpoints.mmdit import FAMILIES, small_config
from parallel_backend.small_checkpoints.prompts import random_prompt

# (batch, height and width in latent cells, text tokens): what divides over 4, what doesn't, and 38-head-like odds.
SHAPES = [(2, 16, 16, 80), (1, 22, 10, 77), (3, 14, 18, 333)]
REMAINDERS = [(1, 2, 6, 5), (2, 10, 14, 1)]


@cache
def reference(path: Path, family: str) -> SD3Transformer2DModel:
    return diffusers_mmdit(small_config(family), load_file(path))


def inputs(batch: int, height: int, width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 1000 + height)
    x = torch.randn(batch, 16, height, width, generator=generator)
    timesteps = torch.rand(batch, generator=generator) * 1000
    return x, timesteps, *random_prompt(tokens, tokens, batch)


def checkpoint(models: Path, family: str) -> Path:
    return models / "diffusion_models" / f"{family}.safetensors"


@cache
def velocity(path: Path, family: str, shape: tuple[int, int, int, int]) -> Tensor:
    """What every mesh is to give."""
    return diffusers_velocity(reference(path, family), *inputs(*shape))


def check(backend: Backend, mesh: MeshSpec, models: Path, family: str, shape: tuple[int, int, int, int]) -> None:
    path = checkpoint(models, family)
    x, timesteps, context, pooled = inputs(*shape)
    expected = velocity(path, family, shape)
    out = backend.load_model(path, mesh, "float32").forward(x, timesteps, context, pooled)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "shape"),
    # SD3.5-medium has the blocks of the others and its own: those are held to the shape that nothing divides.
    [*product(["sd3.5-medium"], SHAPES + REMAINDERS), *((f, SHAPES[1]) for f in FAMILIES if f != "sd3.5-medium")],
    ids=str,
)
@pytest.mark.parametrize("mesh", MeshSpec.all_of(2), ids=MeshSpec.describe)
def test_two_ranks(mesh: MeshSpec, family: str, shape: tuple[int, ...], backend2: Backend, models: Path) -> None:
    check(backend2, mesh, models, family, shape)


# Shapes that neither tokens nor heads divide; those that do are in the whole images below.
FOUR = [("sd3.5-medium", SHAPES[1]), ("sd3.5-medium", SHAPES[2])]


@pytest.mark.parametrize(("family", "shape"), FOUR, ids=str)
@pytest.mark.parametrize("mesh", MeshSpec.all_of(4), ids=MeshSpec.describe)
def test_four_ranks(mesh: MeshSpec, family: str, shape: tuple[int, ...], backend4: Backend, models: Path) -> None:
    check(backend4, mesh, models, family, shape)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshSpec.from_axes((2, 1), (1, 0), (1, 1), mesh_shape=(1, 2)),
        MeshSpec.from_axes((1, 1), (2, 0), (1, 1), mesh_shape=(2, 1)),
    ],
    ids=MeshSpec.describe,
)
def test_axes_form_two_ranks(mesh: MeshSpec, backend2: Backend, models: Path) -> None:
    check(backend2, mesh, models, "sd3.5-large", SHAPES[1])


@pytest.mark.parametrize(
    "mesh",
    [
        MeshSpec.from_axes((2, 1), (2, 0), (1, 1), mesh_shape=(2, 2)),
        MeshSpec.from_axes((1, 1), (2, 0), (2, 1), mesh_shape=(2, 2), sp_method="ulysses"),
        MeshSpec(cfg=2, tp=2, order=("tp", "dp", "cfg", "pp", "patch", "ring", "ulysses")),
    ],
    ids=MeshSpec.describe,
)
def test_axes_form_and_other_orders_four_ranks(mesh: MeshSpec, backend4: Backend, models: Path) -> None:
    check(backend4, mesh, models, "sd3.5-medium", SHAPES[1])


WHOLE = {"seed": 3, "steps": 2, "cfg_scale": 4.0, "sampler": "dpmpp_2m_sde", "scheduler": "normal"}


def whole_images(backend: Backend, models: Path, mesh: MeshSpec) -> Tensor:
    """Prompts of different lengths, a batch that doesn't divide."""
    positive, negative = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 77))
    model = backend.load_model(checkpoint(models, "sd3.5-medium"), mesh, "float32")
    return model.sample(torch.zeros(3, 16, 14, 18), positive, negative, **WHOLE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(backend4: Backend, models: Path) -> Tensor:
    """With dp alone every image is computed by one rank."""
    return whole_images(backend4, models, MeshSpec(dp=4))


# The axes that pictures and branches of the guidance are spread over, alone and beside each other; what those within an
# evaluation give is above, and through a sampling in test_pipeline.
SPREAD = [mesh for mesh in MeshSpec.all_of(4) if mesh.dp * mesh.cfg > 1]


@pytest.mark.parametrize("mesh", SPREAD, ids=MeshSpec.describe)
def test_whole_images_with_guidance(mesh: MeshSpec, alone: Tensor, backend4: Backend, models: Path) -> None:
    latent = whole_images(backend4, models, mesh)
    assert (latent - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_negative_control_another_checkpoint_is_far_off(backend2: Backend, models: Path, tmp_path: Path) -> None:
    from parallel_backend.small_checkpoints.mmdit import write_mmdit

    other = write_mmdit(tmp_path / "other.safetensors", small_config("sd3.5-large"), seed=1)
    x, timesteps, context, pooled = inputs(*SHAPES[0])
    first, second = (
        backend2.load_model(path, MeshSpec(tp=2), "float32").forward(x, timesteps, context, pooled)
        for path in (checkpoint(models, "sd3.5-large"), other)
    )
    assert (first - second).abs().max() > 0.1 * first.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_in_its_rounding(dtype: str, backend2: Backend, models: Path) -> None:
    path = checkpoint(models, "sd3.5-large")
    x, timesteps, context, pooled = inputs(*SHAPES[0])
    expected = diffusers_velocity(reference(path, "sd3.5-large"), x, timesteps, context, pooled)
    for mesh in (MeshSpec(ulysses=2), MeshSpec(ring=2), MeshSpec(tp=2)):
        out = backend2.load_model(path, mesh, dtype).forward(x, timesteps, context, pooled)
        assert (out - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 16, 160, 80), "Use sides of at most 1024 pixels"),
    ],
)
def test_sizes_the_model_cant_take_name_the_remedy(
    shape: tuple[int, ...], words: str, backend2: Backend, models: Path
) -> None:
    model = backend2.load_model(checkpoint(models, "sd3.5-large"), MeshSpec(ring=2), "float32")
    with pytest.raises(InputError, match=words):
        model.forward(*inputs(*shape))
    check(backend2, MeshSpec(ring=2), models, "sd3.5-large", SHAPES[0])
