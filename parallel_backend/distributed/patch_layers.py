"""Layers of an image model on one horizontal band of the image: the same numbers as on the whole image.

Convolutions fetch the rows that they look at beyond the band, norms use the whole image's statistics, attention sees
the whole image's keys and values. `place_band_layers` puts them into a diffusers model.
Shapes: B batch, C channels, Y rows of the band, X columns, G groups, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from .collectives import all_gather, exchange_halo
from .mesh import MeshAxis


@dataclass
class Band:
    """How the image of the current request is cut. One object is shared by all layers of a model."""

    axis: MeshAxis = field(default_factory=lambda: MeshAxis("band"))
    rows: list[int] = field(default_factory=lambda: [1])

    def rows_like(self, x_BCYX: Tensor) -> list[int]:
        """Rows of every band at the scale of `x`, this rank's band of it."""
        factor = x_BCYX.shape[2] / self.rows[self.axis.rank]
        return [int(rows * factor) for rows in self.rows]


class BandConv2d(nn.Module):
    """A convolution of a band whose height is a multiple of the stride.

    Comm: halo exchange with the neighbours: `padding` rows from above, kernel - stride - padding rows from below.
    """

    def __init__(self, conv: nn.Conv2d, band: Band, padding: tuple[int, int] | None = None) -> None:
        """`padding` (above, below) where the model pads by itself; None takes the convolution's own."""
        super().__init__()
        assert isinstance(conv.padding, tuple) and conv.dilation == (1, 1)
        self.conv, self.band = conv, band
        self.columns = conv.padding[1]
        above = conv.padding[0] if padding is None else padding[0]
        self.halo = (above, max(0, conv.kernel_size[0] - conv.stride[0] - above))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.band.axis.degree == 1:
            return self.conv(x_BCYX)
        x = exchange_halo(x_BCYX, *self.halo, self.band.axis)
        conv = self.conv
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, self.columns), groups=conv.groups)


class BandDownsample(nn.Module):
    """diffusers' Downsample2D without padding of its own: one zero row below and column right of the whole image."""

    def __init__(self, downsample: Downsample2D, band: Band) -> None:
        super().__init__()
        conv = downsample.conv
        assert isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (2, 2)
        self.conv, self.band = conv, band

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x = exchange_halo(x_BCYX, 0, 1, self.band.axis)
        return self.conv(F.pad(x, (0, 1, 0, 0)))


class BandGroupNorm(nn.Module):
    """Group norm with the whole image's mean and biased variance, in fp32.

    Bands' statistics are combined around the common mean (Chan et al. 1979), so nothing cancels.
    Comm: one all-gather of 2 * B * G numbers.
    """

    def __init__(self, norm: nn.GroupNorm, band: Band) -> None:
        super().__init__()
        self.norm, self.band = norm, band

    def forward(self, x_BCYX: Tensor) -> Tensor:
        norm, axis = self.norm, self.band.axis
        if axis.degree == 1:
            return norm(x_BCYX)
        B, C = x_BCYX.shape[:2]
        grouped = x_BCYX.reshape(B, norm.num_groups, -1).float()
        var_BG, mean_BG = torch.var_mean(grouped, dim=2, correction=0)
        every = all_gather(torch.stack([mean_BG, var_BG]).unsqueeze(0), 0, [1] * axis.degree, axis)
        rows = torch.tensor(self.band.rows_like(x_BCYX), dtype=torch.float32, device=x_BCYX.device)
        share = (rows / rows.sum()).view(-1, 1, 1)
        mean = (share * every[:, 0]).sum(0)
        var = (share * (every[:, 1] + (every[:, 0] - mean) ** 2)).sum(0)
        normed = (grouped - mean.unsqueeze(2)) * torch.rsqrt(var + norm.eps).unsqueeze(2)
        normed = normed.view(x_BCYX.shape)
        if norm.weight is not None:
            shape = (1, C, 1, 1)
            normed = torch.addcmul(norm.bias.float().view(shape), normed, norm.weight.float().view(shape))
        return normed.to(x_BCYX.dtype)


class BandAttention(nn.Module):
    """diffusers' single-head image attention: a band's queries, the whole image's keys and values.

    Comm: one all-gather of keys and values, 2 * B * L * C elements of each band.
    """

    def __init__(self, attention: Attention, band: Band) -> None:
        super().__init__()
        assert attention.heads == 1 and attention.residual_connection and attention.spatial_norm is None
        self.inner: Attention = attention
        self.band: Band = band

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        inner, (B, C, Y, X) = self.inner, hidden_states.shape
        normed = inner.group_norm(hidden_states)
        tokens_BLC = normed.flatten(2).transpose(1, 2)
        kv = torch.stack([inner.to_k(tokens_BLC), inner.to_v(tokens_BLC)])
        kv = all_gather(kv, 2, [rows * X for rows in self.band.rows_like(hidden_states)], self.band.axis)
        out = F.scaled_dot_product_attention(inner.to_q(tokens_BLC), kv[0], kv[1])
        out = inner.to_out[0](out).transpose(1, 2).reshape(B, C, Y, X)
        return (out + hidden_states) / inner.rescale_output_factor


def place_band_layers(module: nn.Module, band: Band) -> None:
    """Every layer below `module` that looks beyond its own rows is put in its banded form; weights stay."""
    for name, child in module.named_children():
        if isinstance(child, Downsample2D) and child.padding == 0:
            setattr(module, name, BandDownsample(child, band))
            continue
        place_band_layers(child, band)
        if isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1):
            setattr(module, name, BandConv2d(child, band))
        elif isinstance(child, nn.GroupNorm):
            setattr(module, name, BandGroupNorm(child, band))
        elif isinstance(child, Attention):
            setattr(module, name, BandAttention(child, band))
