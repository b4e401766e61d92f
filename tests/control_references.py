"""ControlNets of SD3 in one process, from their files' tensors alone: diffusers' own, and Stability's kind from its formulas."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import SD3ControlNetModel
from safetensors.torch import load_file
from torch import Tensor

from parallel_backend.models.mmdit import HEAD_DIM, MMDiTConfig
from parallel_backend.small_checkpoints.mmdit_control import INPAINTING, INSTANTX, STABILITY

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def diffusers_control(path: Path, base: MMDiTConfig, blocks: int, mask: bool) -> SD3ControlNetModel:
    with torch.device("meta"):
        model = SD3ControlNetModel(
            sample_size=2 * base.pos_embed_size,
            patch_size=base.patch_size,
            in_channels=base.channels,
            num_layers=blocks,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=base.heads,
            joint_attention_dim=base.context_width,
            caption_projection_dim=base.hidden,
            pooled_projection_dim=base.pooled_width,
            out_channels=base.channels,
            pos_embed_max_size=base.pos_embed_size,
            extra_conditioning_channels=int(mask),
            dual_attention_layers=base.dual_blocks,
            qk_norm="rms_norm" if base.qk_norm else None,
        )
    model.load_state_dict(load_file(path), assign=True)
    return model.eval()


@torch.inference_mode()
def control_outputs(path: Path, main: Path, base: MMDiTConfig, kind: str, blocks: int, given: Inputs) -> list[Tensor]:
    """What each block adds, (B, L, D) of all image tokens; `given`: latent, timesteps, context, pooled, hint."""
    x, timesteps, context, pooled, hint = given
    x, hint = (F.pad(t, (0, t.shape[3] % 2, 0, t.shape[2] % 2), mode="circular") for t in (x, hint))
    if kind in (INSTANTX, INPAINTING):
        model = diffusers_control(path, base, blocks, kind == INPAINTING)
        pooled = torch.zeros_like(pooled)  # as diffusers' pipelines do for this kind
        return model(
            hidden_states=x,
            controlnet_cond=hint,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=timesteps,
        ).controlnet_block_samples
    return _stability(
        load_file(path), load_file(main), kind == STABILITY, blocks, (x, timesteps, context, pooled, hint)
    )


def _stability(
    own: dict[str, Tensor], main: dict[str, Tensor], running: bool, blocks: int, given: Inputs
) -> list[Tensor]:
    x, timesteps, _, pooled, hint = given

    def linear(x: Tensor, name: str, of: dict[str, Tensor] = own) -> Tensor:
        return F.linear(x, of[f"{name}.weight"], of[f"{name}.bias"])

    def patches(x: Tensor, name: str, of: dict[str, Tensor] = own) -> Tensor:
        return F.conv2d(x, of[f"{name}.weight"], of[f"{name}.bias"], stride=2).flatten(2).transpose(1, 2)

    rates = 10_000.0 ** (-torch.arange(128) / 128)
    waves = torch.cat([torch.cos(timesteps[:, None] * rates), torch.sin(timesteps[:, None] * rates)], dim=1)
    time, text = ("time_text_embed." + part for part in ("timestep_embedder", "text_embedder"))
    if not running:
        pooled = linear(F.silu(linear(pooled, "y_embedder.mlp.0", main)), "y_embedder.mlp.2", main)
    vector = linear(F.silu(linear(waves, f"{time}.linear_1")), f"{time}.linear_2")
    vector = vector + linear(F.silu(linear(pooled, f"{text}.linear_1")), f"{text}.linear_2")
    tokens = patches(x, "x_embedder.proj", main) if running else patches(x, "pos_embed.proj")
    if running:
        tokens = tokens + places(x.shape[2] // 2, x.shape[3] // 2, tokens.shape[2])
    tokens = tokens + patches(hint, "pos_embed_input.proj")
    outputs = []
    for i in range(blocks):
        block = f"transformer_blocks.{i}"
        modulation = linear(F.silu(vector), f"{block}.adaLN_modulation.1")[:, None].chunk(6, dim=2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        width = tokens.shape[2:]
        normed = F.layer_norm(tokens, width, eps=1e-6) * (1 + scale) + shift
        parts = linear(normed, f"{block}.attn.qkv").unflatten(2, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        weights = (parts[0] @ parts[1].transpose(2, 3) / HEAD_DIM**0.5).softmax(dim=3)
        attended = (weights @ parts[2]).transpose(1, 2).flatten(2)
        out = tokens + gate * linear(attended, f"{block}.attn.proj")
        normed = F.layer_norm(out, width, eps=1e-6) * (1 + mlp_scale) + mlp_shift
        wide = F.gelu(linear(normed, f"{block}.mlp.fc1"), approximate="tanh")
        out = out + mlp_gate * linear(wide, f"{block}.mlp.fc2")
        outputs.append(linear(out, f"controlnet_blocks.{i}"))
        tokens = out if running else tokens
    return outputs


def places(rows: int, columns: int, hidden: int) -> Tensor:
    """(L, D), a number at a time."""
    short, found = min(rows, columns), []
    for row in range(rows):
        for column in range(columns):
            token: list[float] = []
            for position, count in ((column, columns), (row, rows)):
                half = 7.5 * count / short
                place = 7.5 - half + (2 * half * position / (count - 1) if count > 1 else 0)
                angles = [place / 10_000 ** (4 * i / hidden) for i in range(hidden // 4)]
                token += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            found.append(token)
    return torch.tensor(found)
