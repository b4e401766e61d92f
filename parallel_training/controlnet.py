"""The task of a small ControlNet in SDXL's layout: what it adds makes a trained UNet follow the edges of a picture.

Source: Zhang et al. 2023 (arXiv 2302.05543): the UNet's encoder over again, behind convolutions that begin as zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from parallel_backend.errors import ConfigError
from parallel_backend.small_checkpoints.unet_control import control_config

from . import unet
from .config import TrainSpec

# Its middle has no transformer block, as the small ones of diffusers, which leaves a file of 9 MB.
CONFIG = control_config(unet.CONFIG, mid_depth=0)


class ControlNetTask(unet.UNetTask):
    file = "controlnet.safetensors"
    wants_edges = True

    def __init__(self, spec: TrainSpec, device: torch.device) -> None:
        """Raises: ConfigError: there is no UNet in the folder that the run names."""
        path = Path(spec.unet) / unet.FILE
        if not path.is_file():
            raise ConfigError(
                f"{spec.unet} holds no trained UNet.", "Name the folder of a `train unet` that has ended."
            )
        model: Any = UNet2DConditionModel(**unet.CONFIG.diffusers())
        model.load_state_dict(load_file(path))
        self.unet: nn.Module = model.requires_grad_(False).to(device)
        super().__init__(spec, device)

    def network(self) -> nn.Module:
        """It begins with the UNet's encoder, and adds nothing."""
        model: Any = ControlNetModel(**CONFIG.diffusers())
        ours, encoder = model.state_dict(), self.unet.state_dict()
        model.load_state_dict(ours | {name: tensor for name, tensor in encoder.items() if name in ours})
        return model

    def output(self, model: nn.Module, x: Tensor, timesteps: Tensor, words: Tensor, hints: Tensor) -> Tensor:
        """The UNet's, with what the ControlNet gives for the hints added."""
        context, vector = self.prompt(x, words)
        image = hints.to(self.device).expand(-1, CONFIG.hint_channels, -1, -1)
        down, middle = model(x, timesteps, context, image, class_labels=vector, return_dict=False)
        return self.unet(
            x,
            timesteps,
            context,
            class_labels=vector,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
