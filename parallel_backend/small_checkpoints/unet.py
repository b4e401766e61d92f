"""UNets of SDXL's layout, under the names of diffusers or of Stability's single files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from ..models.unet import UNetConfig

Layout = Literal["diffusers", "single file"]

BASE = {"family": "sdxl", "channels": 4, "context_width": 2048, "pooled_width": 2816}
REFINER = {"family": "sdxl-refiner", "channels": 4, "context_width": 1280, "pooled_width": 2560}
TINY = UNetConfig(
    **BASE,  # type: ignore[arg-type]
    block_channels=(64, 128, 128),
    layers_per_block=1,
    down_depths=((0,), (1,), (2,)),
    up_depths=((2, 2), (1, 1), (0, 0)),
    mid_depth=1,
)
CONFIGS = {
    "tiny": TINY,
    # Beside the latent go a mask and the masked latent, or the latent of the picture that is edited.
    "inpainting": replace(TINY, extra_channels=5),
    "editing": replace(TINY, extra_channels=4),
    # With as many layers in a block as SDXL has: a T2I-Adapter's residuals are for these places.
    "two layers": UNetConfig(
        **BASE,  # type: ignore[arg-type]
        block_channels=(64, 128, 128),
        layers_per_block=2,
        down_depths=((0, 0), (1, 1), (1, 1)),
        up_depths=((1, 1, 1), (1, 1, 1), (0, 0, 0)),
        mid_depth=1,
    ),
    "refiner": UNetConfig(
        **REFINER,  # type: ignore[arg-type]
        block_channels=(64, 64, 128, 128),
        layers_per_block=1,
        down_depths=((0,), (1,), (1,), (0,)),
        up_depths=((0, 0), (1, 1), (1, 1), (0, 0)),
        mid_depth=1,
    ),
    # The smallest that ComfyUI takes for an SDXL model, as KOALA: no transformer in the middle.
    "koala": UNetConfig(
        **BASE,  # type: ignore[arg-type]
        block_channels=(320, 320, 320),
        layers_per_block=1,
        down_depths=((0,), (2,), (5,)),
        up_depths=((0, 0), (0, 0), (0, 0)),
        mid_depth=0,
    ),
    # Of the width of SDXL's first block, which ComfyUI takes union ControlNets of alone.
    "for unions": replace(TINY, block_channels=(320,), down_depths=((1,),), up_depths=((1, 1),)),
    # The smallest that ComfyUI takes for SDXL's refiner.
    "comfy-refiner": UNetConfig(
        **REFINER,  # type: ignore[arg-type]
        block_channels=(384, 384, 384, 384),
        layers_per_block=2,
        down_depths=((0, 0), (4, 4), (4, 4), (0, 0)),
        up_depths=((0, 0, 0),) * 4,
        mid_depth=0,
    ),
}

_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def single_file_name(name: str, config: UNetConfig) -> str:
    """The name that Stability's files have for a tensor of diffusers' UNet."""
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    layers = config.layers_per_block
    match = re.fullmatch(
        r"(down|up|mid)_blocks?\.?(\d*)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", stem
    )
    assert match is not None, name
    side, block, part, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = _RESNET.get(rest, rest)
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{leaf}"
    if part == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if any(config.up_depths[block]) else 1}.conv.{leaf}"
    if side == "mid":
        return f"middle_block.{1 if part == 'attentions' else 2 * layer}.{rest}.{leaf}"
    number = 1 + block * (layers + 1) + layer if side == "down" else block * (layers + 1) + layer
    return f"{side.replace('down', 'input').replace('up', 'output')}_blocks.{number}.{int(part == 'attentions')}.{rest}.{leaf}"


def small_unet_config(widths: tuple[int, ...] = (64, 128, 256), depths: tuple[int, ...] = (0, 1, 2)) -> UNetConfig:
    """An SDXL UNet of these widths, with so many transformer blocks in each layer of each scale."""
    layers = 1
    return UNetConfig(
        family="sdxl",
        channels=4,
        block_channels=widths,
        layers_per_block=layers,
        down_depths=tuple((depth,) * layers for depth in depths),
        up_depths=tuple((depth,) * (layers + 1) for depth in reversed(depths)),
        mid_depth=depths[-1],
        context_width=2048,
        pooled_width=2816,
    )


def random_unet(config: UNetConfig, seed: int = 0) -> Any:
    """diffusers' UNet of these sizes, with random weights scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = UNet2DConditionModel(**config.diffusers())
    model.requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(values / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.05 * values)
    return model


def unet_tensors(config: UNetConfig, layout: Layout = "diffusers", seed: int = 0) -> dict[str, Tensor]:
    tensors = random_unet(config, seed).state_dict()
    if layout == "single file":
        tensors = {single_file_name(name, config): value for name, value in tensors.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def write_unet(
    path: Path,
    config: UNetConfig,
    layout: Layout = "diffusers",
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """A UNet file. With a `prefix`, as inside a full checkpoint; `extra` tensors lie beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: value.to(dtype) for name, value in unet_tensors(config, layout).items()}
    save_file(tensors | dict(extra or {}), path, metadata={"format": "pt", "note": "random weights"})
    return path
