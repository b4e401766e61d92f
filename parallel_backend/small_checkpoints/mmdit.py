"""MMDiTs of SD3's families."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import MeshSpec
from ..distributed.mesh import build_mesh
from ..models.mmdit import HEAD_DIM, MMDiT, MMDiTConfig

FAMILIES = ("sd3-medium", "sd3.5-medium", "sd3.5-large")


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
