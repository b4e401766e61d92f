"""ControlNets of SDXL's layout, under the names of diffusers or of single files; Union ones under diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from ..models.unet import UNetConfig
from ..models.unet_control import TYPE_FREQUENCIES, UNetControlConfig
from .unet import Layout, single_file_name

# 1 / the root mean square of SiLU of normal numbers.
SILU_GAIN = 1.68


def control_config(unet: UNetConfig, control_types: int = 0, **changes: Any) -> UNetControlConfig:
    """A ControlNet for that UNet, of its own encoder's depths where `changes` don't say otherwise."""
    return UNetControlConfig(**vars(unet) | {"up_depths": (), "control_types": control_types} | changes)


def single_file_control_name(name: str, config: UNetConfig) -> str:
    """The name that single files have for a tensor of diffusers' ControlNet."""
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(\w+)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d))\.(\w+)", name):
        numbers = {"conv_in": 0, "conv_out": 14}
        number = numbers[match[1]] if match[2] is None else 2 * int(match[2]) + 2
        return f"input_hint_block.{number}.{match[3]}"
    if name.startswith("controlnet_mid_block."):
        return name.replace("controlnet_mid_block.", "middle_block_out.0.")
    return single_file_name(name.replace("add_embedding.", "class_embedding."), config)


def unet_control_tensors(config: UNetControlConfig, layout: Layout = "diffusers", seed: int = 0) -> dict[str, Tensor]:
    """Random values, scaled so that activations stay near 1; what they give is not zero."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = ControlNetModel(**config.diffusers())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if config.mid_depth is None:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("mid_block.")}
    if config.control_types:
        shapes |= _type_shapes(config.block_channels[0], config.control_types)
    tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    if layout == "single file":
        return {single_file_control_name(name, config): value for name, value in tensors.items()}
    # diffusers' own files of SDXL say so; Union files too.
    return {name.replace("class_embedding.", "add_embedding."): value for name, value in tensors.items()}


def _type_shapes(width: int, types: int) -> dict[str, torch.Size]:
    """What Union files have more than others."""
    layer, embedding = "transformer_layes.0", 4 * width
    matrices = {
        f"{layer}.attn.in_proj_": (3 * width, width),
        f"{layer}.attn.out_proj.": (width, width),
        f"{layer}.mlp.c_fc.": (4 * width, width),
        f"{layer}.mlp.c_proj.": (width, 4 * width),
        "spatial_ch_projs.": (width, width),
        "control_add_embedding.linear_1.": (embedding, types * TYPE_FREQUENCIES),
        "control_add_embedding.linear_2.": (embedding, embedding),
    }
    norms = {f"{layer}.{norm}.{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    shapes = {"task_embedding": (types, width), **norms}
    shapes |= {f"{name}weight": shape for name, shape in matrices.items()}
    shapes |= {f"{name}bias": shape[:1] for name, shape in matrices.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if name == "task_embedding":
        return values
    if len(shape) > 1:
        # Of the image's embedding eight layers in a row: each makes good what the activation before it takes.
        gain = SILU_GAIN if name.startswith("controlnet_cond_embedding.") else 1.0
        return gain * values / shape[1:].numel() ** 0.5
    is_scale = ("norm" in name or ".ln_" in name) and name.endswith("weight")
    return float(is_scale) + 0.05 * values


def write_unet_control(
    path: Path,
    config: UNetControlConfig,
    layout: Layout = "diffusers",
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Path:
    """A ControlNet file. Single files of full checkpoints have the `prefix` control_model.; `extra` tensors lie beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: value.to(dtype) for name, value in unet_control_tensors(config, layout, seed).items()}
    save_file(tensors | dict(extra or {}), path, metadata={"format": "pt", "note": "random weights"})
    return path


def control_lora_tensors(config: UNetControlConfig, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A Control-LoRA's, under the names of single files: pairs of low rank for the encoder's matrices, all that a UNet lacks whole."""
    generator = torch.Generator().manual_seed(seed)
    found = {"lora_controlnet": torch.zeros(0)}
    for name, tensor in unet_control_tensors(config, "single file", seed).items():
        stem, _, leaf = name.rpartition(".")
        if name.startswith(("zero_convs.", "input_hint_block.", "middle_block_out.")):
            found[name] = tensor
        elif leaf == "weight" and tensor.ndim > 1:
            rows, columns, *kernel = tensor.shape
            ones = [1] * len(kernel)
            found[f"{stem}.up"] = 0.1 * torch.randn(rows, rank, *ones, generator=generator)
            found[f"{stem}.down"] = 0.1 * torch.randn(rank, columns, *kernel, generator=generator)
    return found
