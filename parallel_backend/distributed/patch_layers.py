"""Layers of an image model on one horizontal band of the image: the same numbers as on the whole image.

Convolutions fetch the rows that they look at beyond the band, norms use the whole image's statistics, attention sees
the whole image's keys and values. `place_band_layers` puts them into a diffusers model.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn

from ..fused.gated_gelu import GATED_GELU
from .band import Band
from .band_attention import BandImageAttention, BandSelfAttention, CachedCrossAttention
from .band_conv import BandConv2d, BandDownsample, BandUpsamplingConv2d, NormedRowsConv2d
from .band_norm import BandGroupNorm


class ActivatedAlready(nn.Module):
    """In place of the SiLU between a `BandGroupNorm` that computes it and a convolution. Vectors (of the timestep) have it still to come."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) if x.ndim == 2 else x


class GatedLinear(nn.Module):
    """diffusers' GEGLU, its gate in one kernel."""

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        self.proj: nn.Module = geglu.proj

    def forward(self, x: Tensor) -> Tensor:
        return GATED_GELU(self.proj(x))


def _image_of_tokens(
    self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """As diffusers' method of a Transformer2DModel with linear projections, which would copy the tokens to channels first."""
    tokens_BLC = self.proj_out(hidden_states)
    return tokens_BLC.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2) + residual


def place_band_layers(module: nn.Module, band: Band, kernel: str = "native", path: str = "") -> None:
    """Every layer below `module` that looks beyond its own rows is put in its banded form, others in quicker ones; weights stay.

    A UNet's attentions must have joint projections already: see `join_projections`.
    """
    _join_norms_with_convolutions(module, band, path)
    for name, child in module.named_children():
        slot = f"{path}.{name}"
        if isinstance(child, BandGroupNorm | BandConv2d):
            continue
        if isinstance(child, Downsample2D) and child.padding == 0:
            setattr(module, name, BandDownsample(child, band, slot))
            continue
        place_band_layers(child, band, kernel, slot)
        if isinstance(child, Transformer2DModel):
            assert child.use_linear_projection
            child._get_output_for_continuous_inputs = MethodType(_image_of_tokens, child)
        if isinstance(child, GEGLU):
            setattr(module, name, GatedLinear(child))
        if isinstance(child, UpDecoderBlock2D):
            upsamplers: Any = child.upsamplers or ()
            for upsample in upsamplers:
                upsample.interpolate, upsample.conv = False, BandUpsamplingConv2d(upsample.conv.conv, band, slot)
        if isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1):
            setattr(module, name, BandConv2d(child, band, slot))
        elif isinstance(child, nn.GroupNorm):
            setattr(module, name, BandGroupNorm(child, band, slot))
        elif isinstance(child, Attention) and child.residual_connection:
            setattr(module, name, BandImageAttention(child, band))
        elif isinstance(child, Attention):
            kind: Any = CachedCrossAttention if child.is_cross_attention else BandSelfAttention
            child.processor = kind(band, kernel, slot)


def _join_norms_with_convolutions(module: Any, band: Band, path: str) -> None:
    """Where diffusers runs a group norm, SiLU and a convolution one after the other, the first does what all three see in common."""
    if isinstance(module, ResnetBlock2D) and module.time_embedding_norm == "default" and _is_silu(module.nonlinearity):
        assert module.upsample is None and module.downsample is None
        pairs, activation = [("norm1", "conv1"), ("norm2", "conv2")], "nonlinearity"
    elif isinstance(getattr(module, "conv_norm_out", None), nn.GroupNorm) and _is_silu(module.conv_act):
        pairs, activation = [("conv_norm_out", "conv_out")], "conv_act"
    else:
        return
    for norm, conv in pairs:
        convolution = NormedRowsConv2d(getattr(module, conv), band, f"{path}.{conv}")
        assert convolution.stride == 1
        layer = BandGroupNorm(getattr(module, norm), band, f"{path}.{norm}", activated=True, halo=convolution.halo)
        setattr(module, norm, layer)
        setattr(module, conv, convolution)
    setattr(module, activation, ActivatedAlready())


def _is_silu(module: object) -> bool:
    return isinstance(module, nn.SiLU)


def join_projections(module: nn.Module) -> None:
    """Attentions below `module` get one projection for q, k and v, or for k and v where these come from the prompt."""
    for attention in [m for m in module.modules() if isinstance(m, Attention)]:
        width = attention.inner_dim
        if attention.is_cross_attention:
            attention.to_kv = nn.Linear(attention.cross_attention_dim, 2 * width, bias=False)
        else:
            attention.to_qkv = nn.Linear(attention.query_dim, 3 * width, bias=False)
            del attention.to_q
        del attention.to_k, attention.to_v
