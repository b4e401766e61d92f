"""Latents of any size: SD3's padded and cropped as ComfyUI does, SDXL's cut in bands where that can be, on every mesh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference_models import diffusers_velocity
from test_parity import checkpoint, inputs, reference
from test_unet import sample as sample_unet
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.errors import InputError
from parallel_backend.models.tokens import padded
from parallel_backend.small_checkpoints.prompts import random_prompt

# Height and width in latent cells: odd ones, ones of fewer tokens than ranks, long ones, and some that divide.
SIZES = [
    *((33, 17), (23, 24), (14, 20), (13, 28), (107, 64), (1, 1), (2, 2), (1, 9), (9, 1)),
    *((3, 5), (5, 63), (17, 17), (15, 16), (16, 15), (128, 2), (2, 127)),
]
FAMILY = "sd3.5-medium"
TWO = [MeshSpec(ring=2), MeshSpec(ulysses=2), MeshSpec(tp=2), MeshSpec(pp=2), MeshSpec(cfg=2)]
FOUR = [
    MeshSpec(ring=2, ulysses=2),
    MeshSpec(ring=4),
    MeshSpec(ulysses=4),
    MeshSpec(pp=2, ulysses=2),
    MeshSpec(tp=2, ring=2),
]


def assert_velocity(backend: Backend, mesh: MeshSpec, models: Path, size: tuple[int, int], batch: int = 1) -> None:
    path, (height, width) = checkpoint(models, FAMILY), size
    x, timesteps, context, pooled = inputs(batch, height, width, 21)
    whole = F.pad(x, (0, width % 2, 0, height % 2), mode="circular")
    expected = diffusers_velocity(reference(path, FAMILY), whole, timesteps, context, pooled)[..., :height, :width]
    out = backend.load_model(path, mesh, "float32").forward(x, timesteps, context, pooled)
    assert out.shape == x.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mmdit_on_two_ranks(size: tuple[int, int], backend2: Backend, models: Path) -> None:
    for mesh in TWO:
        assert_velocity(backend2, mesh, models, size)


@pytest.mark.parametrize("size", [(33, 17), (1, 1), (3, 5), (16, 15)], ids=str)
def test_mmdit_on_four_ranks(size: tuple[int, int], backend4: Backend, models: Path) -> None:
    for mesh in FOUR:
        assert_velocity(backend4, mesh, models, size, batch=3)


def sample_mmdit(backend: Backend, models: Path, mesh: MeshSpec, size: tuple[int, int], **settings: object) -> Tensor:
    prompts = Conditioning(*random_prompt(1, 30)), Conditioning(*random_prompt(2, 77))
    model = backend.load_model(checkpoint(models, FAMILY), mesh, "float32")
    options = {"steps": 4, "seed": 3, "cfg_scale": 4.0, **settings}
    return model.sample(torch.zeros(2, 16, *size), *prompts, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(33, 17), (23, 24), (3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("mesh", [MeshSpec(pp=2), MeshSpec(ring=2)], ids=MeshSpec.describe)
def test_displaced_steps_at_odd_sizes(mesh: MeshSpec, size: tuple[int, int], backend2: Backend, models: Path) -> None:
    """Warm-up over all steps is exact; without it the picture is near, and all of it there."""
    exact = sample_mmdit(backend2, models, MeshSpec(cfg=2), size)
    warmed = sample_mmdit(backend2, models, mesh, size, warmup_steps=4)
    displaced = sample_mmdit(backend2, models, mesh, size, warmup_steps=2)
    assert (warmed - exact).abs().max() <= 2e-5 * exact.abs().max()
    assert displaced.shape == exact.shape and torch.isfinite(displaced).all()
    assert (displaced - exact).norm() < 0.5 * exact.norm()


def test_an_image_larger_than_the_position_table_is_refused(backend2: Backend, models: Path) -> None:
    with pytest.raises(InputError, match="Use sides of at most 1024 pixels"):
        sample_mmdit(backend2, models, MeshSpec(ring=2), (129, 16))


def test_padding_goes_on_with_the_first_rows_and_columns() -> None:
    x = torch.arange(15.0).view(1, 1, 3, 5)
    assert torch.equal(padded(x, 2), F.pad(x, (0, 1, 0, 1), mode="circular"))
    below = padded(x[:, :, 2:], 2, below=x[:, :, :2])
    assert torch.equal(below, padded(x, 2)[:, :, 2:])
    assert padded(x[:, :, :2, :4], 2).shape == (1, 1, 2, 4)


# Areas of 64 and 96 pixels, and sides that no band can have.
@pytest.mark.parametrize("size", [(8, 8), (12, 12), (2, 3), (5, 3), (13, 20), (40, 2), (160, 4)], ids=str)
def test_unet_in_as_many_bands_as_its_rows_allow(size: tuple[int, int], backend4: Backend, unets: Path) -> None:
    path, settings = unets / "unet-tiny.safetensors", {"latent": torch.zeros(2, 4, *size), "steps": 2}
    alone = sample_unet(backend4, path, MeshSpec(dp=4), **settings)
    for mesh in (MeshSpec(patch=4), MeshSpec(cfg=2, patch=2), MeshSpec(patch=2, dp=2)):
        ours = sample_unet(backend4, path, mesh, **settings)
        assert (ours - alone).abs().max() <= 5e-5 * alone.abs().max()
        if mesh.dp == 1:
            assert torch.isfinite(sample_unet(backend4, path, mesh, warmup_steps=1, **settings)).all()


def test_sliced_weights_are_gathered_for_small_latents_too(backend4: Backend, unets: Path) -> None:
    path, latent = unets / "unet-tiny.safetensors", torch.zeros(1, 4, 8, 8)
    alone = sample_unet(backend4, path, MeshSpec(dp=4), latent=latent)
    sliced = sample_unet(backend4, path, MeshSpec(cfg=2, patch=2, sliced=True), latent=latent)
    assert (sliced - alone).abs().max() <= 5e-5 * alone.abs().max()
