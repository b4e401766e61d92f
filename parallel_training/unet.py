"""The task of a small UNet in SDXL's layout: it predicts noise, at Stable Diffusion's timesteps.

Source: Ho et al. 2020 (arXiv 2006.11239), equation 14; micro-conditioning: Podell et al. 2023 (arXiv 2307.01952), 2.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel_backend.config import SamplerSpec
from parallel_backend.demo.captions import SDXL_WIDTHS, embed, word_ids
from parallel_backend.demo.scenes import held_out_scenes
from parallel_backend.demo_checkpoints import small_unet_config
from parallel_backend.models.unet import micro_conditioning
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Discrete

from .autoencoder import open_autoencoder
from .config import TrainSpec
from .data import Batch, LatentSource
from .sheets import SHEET_GUIDANCE, SHEET_STEPS, tile

FILE = "unet.safetensors"
WIDTHS, DEPTHS = (32, 64, 128), (0, 1, 2)


class UNetTask:
    def __init__(self, spec: TrainSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self.autoencoder = open_autoencoder(Path(spec.autoencoder), spec.channels).to(device)
        torch.manual_seed(spec.seed)
        model: Any = UNet2DConditionModel(**small_unet_config(WIDTHS, DEPTHS).diffusers())
        nn.init.zeros_(model.conv_out.weight)
        self.model: nn.Module = model.to(device).to(memory_format=torch.channels_last)
        self.noise = Discrete()

    def start_from(self, folder: Path) -> None:
        """Takes the weights of an exported run."""
        self.model.load_state_dict(load_file(folder / FILE))

    def source(self, rank: int) -> LatentSource:
        return LatentSource(self.spec, rank, self._encode)

    def loss(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        """The noise's squared error at evenly drawn timesteps; some prompts are dropped, for guidance."""
        latents, rows = batch.images.to(self.device), batch.images.shape[0]
        timesteps = torch.randint(self.noise.steps, (rows,), generator=draws)
        sigmas_B111 = self.noise.sigmas[timesteps].to(self.device).view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=draws).to(self.device)
        dropped = torch.rand(rows, generator=draws) < self.spec.prompt_dropout
        x = self.noise.model_input(self.noise.add_noise(latents, noise, sigmas_B111), sigmas_B111)
        predicted = self._output(model, x, timesteps.to(self.device), batch.words.masked_fill(dropped[:, None], 0))
        return F.mse_loss(predicted.float(), noise)

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """Held-out captions, sampled with guidance."""
        words = torch.tensor([word_ids(scene) for scene in held_out_scenes(16)])
        side = self.spec.size // 8
        latents = sample_latent(
            lambda x, t, step: [self._output(model, x, t.expand(len(x)), w) for w in (words, torch.zeros_like(words))],
            SamplerSpec(steps=SHEET_STEPS, cfg_scale=SHEET_GUIDANCE, seed=1, scheduler="normal"),
            self.noise,
            latent=torch.zeros(len(words), self.spec.channels, side, side, device=self.device),
            mask=None,
            noise=None,
            sigmas=None,
            batch_index=None,
            share=lambda x: x,
            on_step=lambda report: None,
        )
        return tile(self.autoencoder.decode(latents).float().cpu(), 8)

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """One file in half precision, under diffusers' names."""
        path = folder / FILE
        tensors = {name: t.detach().half().cpu().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt"})
        return [path]

    def _output(self, model: nn.Module, x: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        context, pooled = embed(words, SDXL_WIDTHS)
        height, width = (8 * side for side in x.shape[2:])
        vector = micro_conditioning(pooled, [height, width, 0, 0, height, width])
        return model(x, timesteps, context.to(self.device), class_labels=vector.to(self.device), return_dict=False)[0]

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images.to(self.device)).cpu()
