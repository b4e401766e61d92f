"""The task of a small UNet in SDXL's layout: it predicts noise, at Stable Diffusion's timesteps.

Source: Ho et al. 2020 (arXiv 2006.11239), equation 14; weights of timesteps: Salimans and Ho 2022 (arXiv 2202.00512),
section 4, "SNR + 1"; micro-conditioning: Podell et al. 2023 (arXiv 2307.01952), 2.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel_backend.demo.captions import SDXL_WIDTHS, embed
from parallel_backend.models.unet import micro_conditioning
from parallel_backend.sampling.parameterization import Discrete
from parallel_backend.small_checkpoints.unet import small_unet_config

from .config import TrainSpec
from .data import Batch
from .latents import LatentTask

FILE = "unet.safetensors"
CONFIG = small_unet_config((64, 128, 128), (0, 1, 1))
# Of a timestep, at most. Beyond it, at the most noise, a step would learn little else.
LARGEST_WEIGHT = 26.0


class UNetTask(LatentTask):
    file = FILE

    def __init__(self, spec: TrainSpec, device: torch.device) -> None:
        self.schedule = Discrete()
        super().__init__(spec, device, self.schedule, "normal")
        torch.manual_seed(spec.seed)
        self.model: nn.Module = self.network().to(device)

    def network(self) -> nn.Module:
        """What is trained, as it begins."""
        model: Any = UNet2DConditionModel(**CONFIG.diffusers())
        nn.init.zeros_(model.conv_out.weight)
        return model

    def start_from(self, folder: Path) -> None:
        """Takes the weights of an exported run."""
        self.model.load_state_dict(load_file(folder / self.file))

    def loss(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        """The noise's squared error at evenly drawn timesteps; some prompts are dropped, for guidance.

        Unweighted, much noise would hardly count, since it is easily told; but there the caption decides what is drawn where.
        """
        latents, rows = batch.images.to(self.device), batch.images.shape[0]
        timesteps = torch.randint(self.schedule.steps, (rows,), generator=draws)
        sigmas_B111 = self.schedule.sigmas[timesteps].to(self.device).view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=draws).to(self.device)
        dropped = torch.rand(rows, generator=draws) < self.spec.prompt_dropout
        x = self.schedule.model_input(self.schedule.add_noise(latents, noise, sigmas_B111), sigmas_B111)
        words = batch.words.masked_fill(dropped[:, None], 0)
        predicted = self.output(model, x, timesteps.to(self.device), words, batch.hints)
        weights_B111 = (1 + sigmas_B111.square()).clamp(max=LARGEST_WEIGHT)
        return (weights_B111 * (predicted.float() - noise).square()).mean()

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """One file in half precision, under diffusers' names."""
        path = folder / self.file
        tensors = {name: t.detach().half().cpu().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt"})
        return [path]

    def output(self, model: nn.Module, x: Tensor, timesteps: Tensor, words: Tensor, hints: Tensor) -> Tensor:
        context, vector = self.prompt(x, words)
        return model(x, timesteps, context, class_labels=vector, return_dict=False)[0]

    def prompt(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Context and micro-conditioning of captions, for whole pictures of x's size."""
        context, pooled = embed(words, SDXL_WIDTHS)
        height, width = (8 * side for side in x.shape[2:])
        vector = micro_conditioning(pooled, [height, width, 0, 0, height, width])
        return context.to(self.device), vector.to(self.device)
