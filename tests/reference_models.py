"""diffusers' own models with the weights of a single-file checkpoint: what parity tests compare with."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor

from parallel_backend.models.mmdit import HEAD_DIM, MMDiTConfig


def diffusers_mmdit(config: MMDiTConfig, tensors: dict[str, Tensor]) -> SD3Transformer2DModel:
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=2 * config.pos_embed_size,
            patch_size=config.patch_size,
            in_channels=config.channels,
            out_channels=config.channels,
            num_layers=config.depth,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=config.heads,
            joint_attention_dim=config.context_width,
            caption_projection_dim=config.hidden,
            pooled_projection_dim=config.pooled_width,
            pos_embed_max_size=config.pos_embed_size,
            dual_attention_layers=config.dual_blocks,
            qk_norm="rms_norm" if config.qk_norm else None,
        )
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors)), assign=True)
    return model.eval()


@torch.no_grad()
def diffusers_velocity(
    model: SD3Transformer2DModel, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    return model(x, encoder_hidden_states=context, pooled_projections=pooled, timestep=timesteps).sample
