"""KL-VAE files in the single-file layout, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


class LdmVaeWeights:
    """Builds the layout's tensors name by name; the sizes are the real VAE's unless `width` says otherwise."""

    def __init__(self, latent_channels: int, quant: bool, width: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self._build(latent_channels, quant, width)

    def _conv(self, name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        scale = (inputs * kernel * kernel) ** -0.5
        self.tensors[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=self._generator) * scale
        self.tensors[f"{name}.bias"] = torch.randn(outputs, generator=self._generator) * 0.02

    def _norm(self, name: str, channels: int) -> None:
        self.tensors[f"{name}.weight"] = 1 + 0.05 * torch.randn(channels, generator=self._generator)
        self.tensors[f"{name}.bias"] = 0.05 * torch.randn(channels, generator=self._generator)

    def _resnet(self, name: str, inputs: int, outputs: int) -> None:
        self._norm(f"{name}.norm1", inputs)
        self._conv(f"{name}.conv1", inputs, outputs)
        self._norm(f"{name}.norm2", outputs)
        self._conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            self._conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def _middle(self, name: str, channels: int) -> None:
        for i in (1, 2):
            self._resnet(f"{name}.mid.block_{i}", channels, channels)
        self._norm(f"{name}.mid.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self._conv(f"{name}.mid.attn_1.{part}", channels, channels, 1)

    def _build(self, latent_channels: int, quant: bool, width: int) -> None:
        widths = [width * m for m in (1, 2, 4, 4)]
        self._conv("encoder.conv_in", 3, width)
        channels = width
        for level, out in enumerate(widths):
            for block in range(2):
                self._resnet(f"encoder.down.{level}.block.{block}", channels, out)
                channels = out
            if level < 3:
                self._conv(f"encoder.down.{level}.downsample.conv", out, out)
        self._middle("encoder", channels)
        self._norm("encoder.norm_out", channels)
        self._conv("encoder.conv_out", channels, 2 * latent_channels)
        self._conv("decoder.conv_in", latent_channels, channels)
        self._middle("decoder", channels)
        for level, out in reversed(list(enumerate(widths))):
            for block in range(3):
                self._resnet(f"decoder.up.{level}.block.{block}", channels, out)
                channels = out
            if level:
                self._conv(f"decoder.up.{level}.upsample.conv", out, out)
        self._norm("decoder.norm_out", channels)
        self._conv("decoder.conv_out", channels, 3)
        if quant:
            self._conv("quant_conv", 2 * latent_channels, 2 * latent_channels, 1)
            self._conv("post_quant_conv", latent_channels, latent_channels, 1)


def write_kl_vae(
    path: Path, *, latent_channels: int, quant: bool, width: int = 32, prefix: str = "", seed: int = 0
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = LdmVaeWeights(latent_channels, quant, width, seed).tensors
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    return path
