"""The task of a tiny autoencoder: TAESD's architecture, latents near unit variance."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel_backend.checkpoint_files.taesd_files import FAMILIES, taesd_files
from parallel_backend.demo.drawing import draw
from parallel_backend.demo.scenes import held_out_scenes
from parallel_backend.errors import ConfigError
from parallel_backend.models.vae_names import taesd_module_names
from parallel_backend.small_checkpoints.taesd import write_taesd_files

from .config import TrainSpec
from .data import Batch, PixelSource, pixels
from .sheets import tile

# How much the mean and spread of latents weigh against the picture: they stay where a diffusion model wants them.
SPREAD_WEIGHT = 0.05
EDGE_WEIGHT = 1.0


class Autoencoder(nn.Module):
    """Pixels in 0..1 to latents and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        model: Any = AutoencoderTiny(latent_channels=channels)
        self.encoder, self.decoder = model.encoder, model.decoder

    def encode(self, images_BCYX: Tensor) -> Tensor:
        return self.encoder(images_BCYX * 2 - 1)

    def decode(self, latents_BCYX: Tensor) -> Tensor:
        return (self.decoder(latents_BCYX) + 1) / 2

    def forward(self, images_BCYX: Tensor, noise_BCYX: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Pictures restored from latents with the noise added, and the latents without it."""
        latents = self.encode(images_BCYX)
        return self.decode(latents + noise_BCYX), latents


class AutoencoderTask:
    def __init__(self, spec: TrainSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        # This layout makes convolutions half as fast again on CPUs, and suits tensor cores.
        self.model = Autoencoder(spec.channels).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def start_from(self, folder: Path) -> None:
        """Takes the weights of an exported run; from one of other latent channels, all but the layers that touch latents."""
        ours = self.model.state_dict()
        known = (self.spec.channels, *FAMILIES)
        channels = next((c for c in known if all(path.exists() for path in taesd_files(folder, FAMILIES[c]))), 0)
        if not channels:
            raise ConfigError(f"{folder} holds no trained autoencoder.", "Name the folder of a run that has ended.")
        saved = open_autoencoder(folder, channels).state_dict()
        fitting = {name: tensor for name, tensor in saved.items() if tensor.shape == ours[name].shape}
        self.model.load_state_dict(ours | fitting)

    def source(self, rank: int) -> PixelSource:
        return PixelSource(self.spec, rank)

    def loss(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        """L1 + L2 of pixels, L1 of their differences to the next pixel, and the spread of each latent channel.

        The decoder sees each picture's latents through noise of a strength drawn for it.
        """
        images = batch.images.to(self.device).contiguous(memory_format=torch.channels_last)
        rows, _, height, width = images.shape
        strengths_B111 = self.spec.latent_noise * torch.rand(rows, 1, 1, 1, generator=draws)
        noise = strengths_B111 * torch.randn(rows, self.spec.channels, height // 8, width // 8, generator=draws)
        restored, latents = model(images, noise.to(self.device))
        edges = sum(F.l1_loss(restored.diff(dim=dim), images.diff(dim=dim)) for dim in (2, 3))
        mean, variance = latents.float().mean((0, 2, 3)), latents.float().var((0, 2, 3))
        spread = mean.square().mean() + (variance - 1).square().mean()
        return F.l1_loss(restored, images) + F.mse_loss(restored, images) + EDGE_WEIGHT * edges + SPREAD_WEIGHT * spread

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """Held-out scenes above, their reconstructions below."""
        rng = random.Random(0)
        images = torch.stack([pixels(draw(s, self.spec.size, self.spec.size, rng)) for s in held_out_scenes(8)])
        restored, _ = model(images.to(self.device))
        return tile(torch.cat([images, restored.float().cpu()]), 8)

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """TAESD's two files in half precision, as ComfyUI's vae_approx folder has them."""
        assert isinstance(model, Autoencoder)
        return list(
            write_taesd_files(folder, FAMILIES[self.spec.channels], model.encoder, model.decoder, torch.float16)
        )


def open_autoencoder(folder: Path, channels: int) -> Autoencoder:
    """An exported autoencoder, frozen."""
    model = Autoencoder(channels)
    for part, path in zip(("encoder", "decoder"), taesd_files(folder, FAMILIES[channels]), strict=True):
        getattr(model, part).load_state_dict(taesd_module_names(part, load_file(path)))
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
