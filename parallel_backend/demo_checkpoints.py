"""Small checkpoints with random weights in the true layouts: for the demo, the tests and the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import MeshSpec
from .distributed.mesh import build_mesh
from .models.mmdit import HEAD_DIM, MMDiT, MMDiTConfig
from .models.unet import UNetConfig, micro_conditioning
from .taesd_files import taesd_files

DEMO_FAMILIES = ("sd3-medium", "sd3.5-medium", "sd3.5-large")


def small_config(family: str, depth: int = 4, heads: int | None = None, pos_embed_size: int = 64) -> MMDiTConfig:
    """An MMDiT of that family, `depth` blocks deep; ComfyUI reads as many heads as blocks."""
    return MMDiTConfig(
        family=family,
        depth=depth,
        heads=heads or depth,
        dual_blocks=tuple(range(max(1, depth // 2))) if family == "sd3.5-medium" else (),
        qk_norm=family != "sd3-medium",
        channels=16,
        patch_size=2,
        pos_embed_size=pos_embed_size,
        context_width=4096,
        pooled_width=2048,
        mlp_width=4 * HEAD_DIM * (heads or depth),
    )


def mmdit_tensors(config: MMDiTConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the single-file names, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = MMDiT(config, build_mesh(MeshSpec()), "native")
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            values = 1 + 0.05 * values
        elif name.endswith("bias"):
            values = 0.02 * values
        else:
            values = values / parameter[0].numel() ** 0.5
        tensors[name] = values
    tensors["pos_embed"] = sine_table(config.hidden, config.pos_embed_size)
    return tensors


def sine_table(hidden: int, size: int) -> Tensor:
    """(1, size * size, hidden): sines and cosines of the column, then of the row."""
    rates = 10_000.0 ** -(torch.arange(hidden // 4, dtype=torch.float64) / (hidden / 4))
    row, column = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    halves = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * rates
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    return torch.cat(halves, dim=1).float()[None]


def write_mmdit(
    path: Path, config: MMDiTConfig, *, dtype: torch.dtype = torch.float32, prefix: str = "", seed: int = 0
) -> Path:
    """An MMDiT file. With a `prefix`, as inside a full checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: t.to(dtype).contiguous() for name, t in mmdit_tensors(config, seed).items()}
    save_file(tensors, path, metadata={"format": "pt", "note": "random weights"})
    return path


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


def write_unet(path: Path, config: UNetConfig, seed: int = 0) -> Path:
    """A UNet file under diffusers' names, with random weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in random_unet(config, seed).state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "note": "random weights"})
    return path


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


def random_prompt(seed: int, tokens: int = 77, rows: int = 1) -> tuple[Tensor, Tensor]:
    """(context, pooled) in SD3's shapes, for when there is no text encoder."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, tokens, 4096, generator=generator), torch.randn(rows, 2048, generator=generator)


def random_sdxl_prompt(seed: int, tokens: int = 77, side: int = 1024) -> tuple[Tensor, Tensor]:
    """(context, pooled with the sizes of a square picture embedded) in SDXL's shapes."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 1280, generator=generator)
    return torch.randn(1, tokens, 2048, generator=generator), micro_conditioning(pooled, [side, side, 0, 0, side, side])
