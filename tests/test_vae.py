"""Bands against diffusers on the whole image: any height, any number of ranks, no seams, less memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from rank_pool import RankPool, groups
from safetensors.torch import load_file
from torch import Tensor

from parallel_backend.distributed.mesh import BandAxes
from parallel_backend.errors import CheckpointError, InputError
from parallel_backend.models.vae import TAESD_SCALES, BandVAE
from parallel_backend.models.vae_checkpoint import open_vae

pytestmark = pytest.mark.busy

FILES = {
    "kl-16": ["vae/sd3_vae.safetensors"],
    "kl-4": ["vae/sdxl_vae.safetensors"],
    "taesd3": ["vae_approx/taesd3_encoder.safetensors", "vae_approx/taesd3_decoder.safetensors"],
    "taesdxl": ["vae_approx/taesdxl_encoder.safetensors", "vae_approx/taesdxl_decoder.safetensors"],
}


@cache
def reference(models: Path, name: str) -> AutoencoderKL | AutoencoderTiny:
    """diffusers' own model, built without the code under test."""
    tensors = [load_file(models / file) for file in FILES[name]]
    if name.startswith("taesd"):
        model = AutoencoderTiny(latent_channels=16 if name == "taesd3" else 4)
        weights = {f"encoder.layers.{k}": v for k, v in tensors[0].items()}
        for key, value in tensors[1].items():
            number, rest = key.split(".", 1)
            weights[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    else:
        quant, levels = name == "kl-4", 4
        config = {
            "block_out_channels": (32, 64, 128, 128),
            "layers_per_block": 2,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "latent_channels": 4 if quant else 16,
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
        }
        model, weights = AutoencoderKL(**config), convert_ldm_vae_checkpoint(tensors[0], config)
    model.load_state_dict(weights)
    return model.eval()


@cache
def inputs(name: str, batch: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A latent and an image of the same size."""
    generator = torch.Generator().manual_seed(rows)
    channels = 16 if name in ("kl-16", "taesd3") else 4
    latent = torch.randn(batch, channels, rows, columns, generator=generator)
    return latent, torch.rand(batch, rows * 8, columns * 8, 3, generator=generator)


@cache
def expected(models: Path, name: str, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """What any number of ranks is to give of these inputs."""
    latent, image = inputs(name, *size)
    return reference_decode(models, name, latent), reference_encode(models, name, image)


@torch.no_grad()
def reference_decode(models: Path, name: str, latent: Tensor) -> Tensor:
    scale, shift = TAESD_SCALES.get(name, (1.0, 0.0))
    image = reference(models, name).decode((latent - shift) * scale).sample
    return ((image + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)


@torch.no_grad()
def reference_encode(models: Path, name: str, image: Tensor) -> Tensor:
    encoded = reference(models, name).encode(image.permute(0, 3, 1, 2) * 2 - 1)
    scale, shift = TAESD_SCALES.get(name, (1.0, 0.0))
    return encoded.latents / scale + shift if name.startswith("taesd") else encoded.latent_dist.mode()


@cache
def band_vae(models: Path, name: str) -> BandVAE:
    return open_vae([models / file for file in FILES[name]]).build(
        torch.device("cpu"), torch.float32, BandAxes(groups())
    )


@torch.inference_mode()
def bands_case(models: Path, name: str, latent: Tensor, image: Tensor) -> tuple[Tensor | None, Tensor | None]:
    vae = band_vae(models, name)
    return vae.decode(latent), vae.encode(image)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(2, 12, 10), (1, 7, 5), (1, 3, 9), (1, 1, 4)], ids=str)
def test_decode_and_encode_equal_diffusers(
    name: str, world_size: int, size: tuple[int, int, int], ranks: RankPool, models: Path
) -> None:
    (decoded, encoded), *others = ranks(world_size, bands_case, models, name, *inputs(name, *size))
    image, latent = expected(models, name, size)
    assert image.std() > 0.01 or name.startswith("taesd")
    torch.testing.assert_close(decoded, image, rtol=1e-5, atol=1e-5)
    assert (encoded - latent).abs().max() <= 1e-5 * latent.abs().max()
    assert all(part == (None, None) for part in others)


@torch.inference_mode()
def without_halo_case(models: Path, latent: Tensor) -> Tensor:
    """Each half decoded by itself and put together: what a split without communication gives."""
    halves = [
        bands_case.__wrapped__(models, "kl-16", half, torch.zeros(1, 8, 8, 3))[0] for half in latent.chunk(2, dim=2)
    ]
    return torch.cat(halves, dim=1)


def test_negative_control_halves_without_communication_show_a_seam(models: Path) -> None:
    latent = torch.randn(1, 16, 12, 10, generator=torch.Generator().manual_seed(1))
    assert (without_halo_case(models, latent) - reference_decode(models, "kl-16", latent)).abs().max() > 1e-2


@torch.inference_mode()
def peak_case(models: Path, rows: int) -> int:
    """Bytes of the largest activation that this rank's decoder makes."""
    vae = band_vae(models, "kl-16")
    largest = 0

    def note(_module: object, _inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.nbytes)

    hooks = [module.register_forward_hook(note) for module in vae.model.decoder.modules()]
    vae.decode(torch.zeros(1, 16, rows, 8))
    for hook in hooks:
        hook.remove()
    return largest


def test_activations_per_rank_fall_with_the_ranks(ranks: RankPool, models: Path) -> None:
    alone = ranks(1, peak_case, models, 24)[0]
    for world_size in (2, 3, 4):
        assert max(ranks(world_size, peak_case, models, 24)) == alone // world_size


def test_a_vae_without_its_decoder_is_named(tmp_path: Path, models: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no AutoencoderKL"):
        open_vae([models / "diffusion_models" / "sd3.5-large.safetensors"])


def test_shapes_that_dont_fit_are_named(models: Path) -> None:
    vae = band_vae(models, "kl-4")
    with pytest.raises(InputError, match=r"needs \(batch, 4,.* belongs to the model"):
        vae.check_latent(torch.zeros(1, 16, 4, 4))
    with pytest.raises(InputError, match=r"needs \(batch, 4,.* of one cell or more"):
        vae.check_latent(torch.zeros(1, 4, 0, 4))


@pytest.mark.parametrize(
    ("shape", "message", "remedy"),
    [
        ((1, 20, 16, 3), "16 x 20 pixels", "Crop or scale both sides to a multiple of 8."),
        ((1, 7, 64, 3), "64 x 7 pixels", "Scale both sides to 8 pixels or more."),
        ((1, 64, 0, 3), "0 x 64 pixels", "Scale both sides to 8 pixels or more."),
        ((1, 4, 4, 1), "4 x 4 pixels", "Scale both sides to 8 pixels or more."),
        ((1, 64, 64, 1), "An image of 1 channel came", "It is grey: repeat its channel three times"),
        ((1, 64, 64, 4), "An image of 4 channels came", "Leave its alpha channel out."),
        ((1, 20, 16, 2), "An image of 2 channels came", "Convert it to RGB."),
        ((64, 64, 3), r"shape \[64, 64, 3\]", "Give a batch of one image or more."),
        ((0, 64, 64, 3), r"shape \[0, 64, 64, 3\]", "Give a batch of one image or more."),
    ],
    ids=str,
)
def test_an_image_that_cannot_be_encoded_is_told_what_would_help(
    shape: tuple[int, ...], message: str, remedy: str, models: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        band_vae(models, "kl-4").check_image(torch.zeros(shape))
    assert caught.value.remedy.startswith(remedy)
