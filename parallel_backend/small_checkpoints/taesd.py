"""TAESD's encoders and decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import nn

from ..checkpoint_files.taesd_files import taesd_files


def write_taesd(folder: Path, name: str = "taesd3", channels: int = 16, seed: int = 0) -> tuple[Path, Path]:
    """TAESD's encoder and decoder files, under the names that ComfyUI's vae_approx folder has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoencoderTiny(latent_channels=channels)
    return write_taesd_files(folder, name, model.encoder, model.decoder)


def write_taesd_files(
    folder: Path, name: str, encoder: nn.Module, decoder: nn.Module, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """The encoder and decoder of an AutoencoderTiny under TAESD's own names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = taesd_files(folder, name)
    for path, module, shift in zip(paths, (encoder, decoder), (0, 1), strict=True):
        tensors = {}
        for key, value in module.state_dict().items():
            # TAESD counts the clamp before the decoder's first layer; diffusers keeps it in forward.
            number, rest = key.removeprefix("layers.").split(".", 1)
            tensors[f"{int(number) + shift}.{rest}"] = value.to("cpu", dtype).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    return paths
