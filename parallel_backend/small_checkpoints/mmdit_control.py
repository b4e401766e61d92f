"""ControlNets of SD3 and SD3.5, in the layouts of the published files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.mmdit import FREQUENCIES, HEAD_DIM, MMDiTConfig
from .mmdit import sine_table

INSTANTX, INPAINTING, STABILITY, DOUBLE = "instantx", "instantx inpainting", "stability", "stability, double"
CONTROL_KINDS = (INSTANTX, INPAINTING, STABILITY, DOUBLE)


def control_tensors(kind: str, base: MMDiTConfig, blocks: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a ControlNet of that kind, for a main model of these sizes; all of them have an effect."""
    shapes = _joint_shapes(base, blocks) if kind in (INSTANTX, INPAINTING) else _image_shapes(base, blocks, kind)
    hidden, patch = base.hidden, base.patch_size
    channels = base.channels + (kind == INPAINTING)
    shapes["pos_embed_input.proj"] = (hidden, channels, patch, patch)
    for part, width in (("timestep", FREQUENCIES), ("text", hidden if kind == DOUBLE else base.pooled_width)):
        shapes[f"time_text_embed.{part}_embedder.linear_1"] = (hidden, width)
        shapes[f"time_text_embed.{part}_embedder.linear_2"] = (hidden, hidden)
    for i in range(blocks):
        shapes[f"controlnet_blocks.{i}"] = (hidden, hidden)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[f"{name}.weight"] = 1 + 0.05 * values
            continue
        tensors[f"{name}.weight"] = values / values[0].numel() ** 0.5
        tensors[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    if kind in (INSTANTX, INPAINTING):
        tensors["pos_embed.pos_embed"] = sine_table(hidden, base.pos_embed_size)
    else:
        tensors["control_type"] = torch.tensor(1.0)
    return tensors


def _joint_shapes(base: MMDiTConfig, blocks: int) -> dict[str, tuple[int, ...]]:
    hidden, wide, patch = base.hidden, base.mlp_width, base.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.proj": (hidden, base.channels, patch, patch),
        "context_embedder": (hidden, base.context_width),
    }
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        dual = i in base.dual_blocks
        shapes[f"{block}.norm1.linear"] = ((9 if dual else 6) * hidden, hidden)
        shapes[f"{block}.norm1_context.linear"] = (6 * hidden, hidden)
        for ff in ("ff", "ff_context"):
            shapes[f"{block}.{ff}.net.0.proj"] = (wide, hidden)
            shapes[f"{block}.{ff}.net.2"] = (hidden, wide)
        inner = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        inner += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
        inner += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"] if dual else []
        shapes |= {f"{block}.{name}": (hidden, hidden) for name in inner}
        if base.qk_norm:
            norms = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
            norms += ["attn2.norm_q", "attn2.norm_k"] if dual else []
            shapes |= {f"{block}.{name}": (HEAD_DIM,) for name in norms}
    return shapes


def _image_shapes(base: MMDiTConfig, blocks: int, kind: str) -> dict[str, tuple[int, ...]]:
    hidden, wide, patch = base.hidden, base.mlp_width, base.patch_size
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == DOUBLE:
        shapes["pos_embed.proj"] = (hidden, base.channels, patch, patch)
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        shapes[f"{block}.attn.qkv"] = (3 * hidden, hidden)
        shapes[f"{block}.attn.proj"] = (hidden, hidden)
        shapes[f"{block}.mlp.fc1"] = (wide, hidden)
        shapes[f"{block}.mlp.fc2"] = (hidden, wide)
        shapes[f"{block}.adaLN_modulation.1"] = (6 * hidden, hidden)
    return shapes


def write_control(
    path: Path,
    kind: str,
    base: MMDiTConfig,
    blocks: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A ControlNet's file; `kind` is one of CONTROL_KINDS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(dtype).contiguous() for name, t in control_tensors(kind, base, blocks, seed).items()}
    save_file(tensors, path, metadata={"format": "pt", "note": "random weights"})
    return path
