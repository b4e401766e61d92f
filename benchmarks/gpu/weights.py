"""Models with random weights that are made on the device, so that 16 GB need not pass through the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from parallel_backend.bench.random_model import OnDevice, random_tensor
from parallel_backend.config import MeshSpec
from parallel_backend.distributed.mesh import Mesh, build_mesh
from parallel_backend.distributed.tensor_parallel import Shard, ShardedParameter
from parallel_backend.models.families import SD3, SDXL
from parallel_backend.models.mmdit import MMDiT, MMDiTConfig
from parallel_backend.models.mmdit_checkpoint import POS_EMBED, PositionTable
from parallel_backend.models.network import TokenNetwork
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.rows import Prompt
from parallel_backend.models.unet import BandUNet, UNetConfig, loadable_unet
from parallel_backend.small_checkpoints.prompts import random_prompt, random_sdxl_prompt

Tensors = dict[str, Tensor]


def mmdit_tensors(config: MMDiTConfig, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Under the single-file names."""
    torch.manual_seed(1)
    with torch.device("meta"):
        model = MMDiT(config, build_mesh(MeshSpec()), "native")
    shapes = {name: p.full_shape for name, p in model.named_parameters()} | {
        POS_EMBED: (1, config.pos_embed_size**2, config.hidden)
    }
    return {name: random_tensor(name, shape, device, dtype) for name, shape in shapes.items()}


def mmdit_predictor(tensors: Tensors, config: MMDiTConfig, device: torch.device, dtype: torch.dtype) -> Predictor:
    """Our MMDiT on these tensors, which it shares where a rank has them whole."""
    mesh, source = build_mesh(MeshSpec()), OnDevice(tensors)
    with torch.device("meta"):
        model = MMDiT(config, mesh, "native")
    fill(model, source.read)
    network = TokenNetwork(model, PositionTable(source, config.pos_embed_size, device, dtype))
    return Predictor(network, mesh, dtype, device, SD3)


def unet_tensors(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Under diffusers' names."""
    torch.manual_seed(2)
    with torch.device("meta"):
        model = UNet2DConditionModel(**config.diffusers())
    return {name: random_tensor(name, p.shape, device, dtype) for name, p in model.named_parameters()}


def diffusers_unet(tensors: Tensors, config: UNetConfig) -> Any:
    """diffusers' own model on these tensors, which it shares."""
    with torch.device("meta"):
        model: Any = UNet2DConditionModel(**config.diffusers())
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval()


def unet_predictor(
    tensors: Tensors,
    config: UNetConfig,
    device: torch.device,
    dtype: torch.dtype,
    mesh: Mesh | None = None,
) -> Predictor:
    """Our UNet in bands on these tensors; convolutions and joined projections are copies."""
    mesh, source = mesh or build_mesh(MeshSpec()), OnDevice(joined(tensors))
    with torch.device("meta"):
        model = loadable_unet(config, mesh)
    fill(model, source.read)
    model.requires_grad_(False).eval()
    return Predictor(BandUNet(model, config, mesh, "native"), mesh, dtype, device, SDXL)


def joined(tensors: Tensors) -> Tensors:
    """Self-attention's q, k, v as one tensor and cross-attention's k, v as one, as our UNet has them."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in ("to_q", "to_k", "to_v") or (part == "to_q" and stem.endswith("attn2")):
            found[name] = tensor
        elif part == "to_q":
            found[f"{stem}.to_qkv.weight"] = torch.cat(
                [tensors[f"{stem}.{p}.weight"] for p in ("to_q", "to_k", "to_v")]
            )
        elif part == "to_k" and stem.endswith("attn2"):
            found[f"{stem}.to_kv.weight"] = torch.cat([tensors[f"{stem}.{p}.weight"] for p in ("to_k", "to_v")])
    return found


def fill(model: nn.Module, read: Callable[[str, Shard | None], Tensor]) -> None:
    """Every parameter of a model on the meta device is this rank's part of the tensor of its name."""
    for name, parameter in list(model.named_parameters()):
        tensor = read(name, parameter.shard if isinstance(parameter, ShardedParameter) else None)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))


def sd3_prompts(text: int, device: torch.device, dtype: torch.dtype, count: int = 2) -> list[Prompt]:
    """With guidance two, of equal length: one evaluation of two rows."""
    return [_on(random_prompt(seed, text), device, dtype) for seed in range(1, count + 1)]


def sdxl_prompts(config: UNetConfig, device: torch.device, dtype: torch.dtype, count: int = 2) -> list[Prompt]:
    widths = {"context_width": config.context_width, "pooled_width": config.pooled_width}
    return [_on(random_sdxl_prompt(seed, 77, **widths), device, dtype) for seed in range(1, count + 1)]


def _on(pair: tuple[Tensor, Tensor], device: torch.device, dtype: torch.dtype) -> Prompt:
    return Prompt(*(tensor.to(device, dtype) for tensor in pair))


def relative_error(out: Tensor, expected: Tensor) -> float:
    """The norm of the difference in units of the norm, in fp64."""
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)
