"""Layers of an image model on one horizontal band of the image: the same numbers as on the whole image.

Convolutions fetch the rows that they look at beyond the band, norms use the whole image's statistics, attention sees
the whole image's keys and values. `place_band_layers` puts them into a diffusers model.
Shapes: B batch, C channels, Y rows of the band, X columns, G groups, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn

from .collectives import all_gather, exchange_halo, facing_rows, halo_sizes, start_neighbour_exchange, with_halo
from .graph_breaks import breaks_graph
from .kernels import attend
from .mesh import MeshAxis
from .stale import Step


@dataclass
class Band:
    """How the image of the current request is cut, and where in its job it is. All layers of a model share one.

    `rows` of every band and `columns` of the image are those of the model's input. `prompt_kv` are the keys and values of the
    prompt, (B, L, 2 * D), by the slot of the attention that takes them.
    """

    axis: MeshAxis = field(default_factory=lambda: MeshAxis("band"))
    rows: list[int] = field(default_factory=lambda: [1])
    columns: int = 1
    step: Step = field(default_factory=Step)
    prompt_kv: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def own_rows(self) -> tuple[int, int]:
        """First and one-past-last row of this rank's band."""
        start = sum(self.rows[: self.axis.rank])
        return start, start + self.rows[self.axis.rank]

    def rows_like(self, x_BCYX: Tensor) -> list[int]:
        """Rows of every band at the scale of `x`, this rank's band of it."""
        if x_BCYX.shape[3] > self.columns:
            return [rows * (x_BCYX.shape[3] // self.columns) for rows in self.rows]
        return next(rows for rows, columns in self._halvings() if columns == x_BCYX.shape[3])

    def tokens_like(self, x_BLD: Tensor) -> list[int]:
        """Tokens of every band at the scale at which this rank's band has as many as `x`."""
        rows, columns = next(
            (rows, columns) for rows, columns in self._halvings() if rows[self.axis.rank] * columns == x_BLD.shape[1]
        )
        return [count * columns for count in rows]

    def _halvings(self) -> Iterator[tuple[list[int], int]]:
        rows, columns = self.rows, self.columns
        while True:
            yield rows, columns
            if columns == 1:
                return
            rows, columns = [-(-count // 2) for count in rows], -(-columns // 2)


class BandConv2d(nn.Module):
    """A convolution of a band. Only the last band's height may not be a multiple of the stride.

    Comm: `padding` rows from above, kernel - stride - padding rows from below; in displaced steps they arrive late.
    """

    def __init__(self, conv: nn.Conv2d, band: Band, slot: str) -> None:
        super().__init__()
        assert isinstance(conv.padding, tuple) and conv.dilation == (1, 1)
        self.conv, self.band, self.slot = conv, band, slot
        self.columns, above = conv.padding[1], conv.padding[0]
        self.halo = (above, max(0, conv.kernel_size[0] - conv.stride[0] - above))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.conv(x_BCYX) if self.band.axis.degree == 1 else self.of_rows(self.with_rows_around(x_BCYX))

    def with_rows_around(self, x_BCYX: Tensor) -> Tensor:
        x = _with_halo(x_BCYX, *self.halo, self.band, self.slot)
        # Below an odd height a strided kernel looks at one more row, which lies outside the image.
        outside = x_BCYX.shape[2] % self.conv.stride[0]
        return F.pad(x, (0, 0, 0, outside)) if outside else x

    def of_rows(self, x_BCYX: Tensor) -> Tensor:
        conv = self.conv
        return F.conv2d(x_BCYX, conv.weight, conv.bias, conv.stride, (0, self.columns), groups=conv.groups)


class BandUpsamplingConv2d(BandConv2d):
    """A convolution with the upsampling by 2 before it, whose result, the largest tensor of a decode, nobody else holds."""

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x = F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest")
        if self.band.axis.degree == 1:
            return self.conv(x)
        x = self.with_rows_around(x)
        return self.of_rows(x)


class CuttingConv2d(nn.Module):
    """A model's first convolution: every rank has its whole input, so the rows around the band are there already."""

    def __init__(self, conv: nn.Conv2d, band: Band) -> None:
        super().__init__()
        assert isinstance(conv.padding, tuple) and conv.stride == conv.dilation == (1, 1)
        self.conv, self.band = conv, band
        self.halo, self.columns = conv.padding

    def forward(self, full_BCYX: Tensor) -> Tensor:
        if self.band.axis.degree == 1:
            return self.conv(full_BCYX)
        start, stop = self.band.own_rows
        x = F.pad(full_BCYX, (0, 0, self.halo, self.halo))[:, :, start : stop + 2 * self.halo]
        return F.conv2d(x, self.conv.weight, self.conv.bias, 1, (0, self.columns), groups=self.conv.groups)


def _with_halo(x_BCYX: Tensor, above: int, below: int, band: Band, slot: str) -> Tensor:
    """The band with its neighbours' rows: fresh ones, or in displaced steps those of the last evaluation."""
    stale, place = band.step.stale, (slot, band.step.branch)
    if stale is None or not (above or below):
        return exchange_halo(x_BCYX, above, below, band.axis)
    rows, sizes = facing_rows(x_BCYX, above, below), halo_sizes(x_BCYX, above, below)
    if band.step.phase == "sync":
        received = start_neighbour_exchange(*rows, sizes, band.axis).wait()
        stale.keep_facing(place, received)
    else:
        received = stale.swap_facing(place, *rows, sizes)
    return with_halo(x_BCYX, received, above, below)


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

    Bands' statistics are combined around the common mean (Chan et al. 1979), so nothing cancels. In displaced steps
    the whole image's are last evaluation's, moved as far as this band's own have moved since (DistriFusion, section 4).
    Comm: 2 * B * G numbers to every rank.
    """

    def __init__(self, norm: nn.GroupNorm, band: Band, slot: str) -> None:
        super().__init__()
        self.norm, self.band, self.slot = norm, band, slot

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.band.axis.degree == 1:
            return self.norm(x_BCYX)
        return self.by_kernel(x_BCYX) if x_BCYX.device.type == "cpu" else self.by_sums(x_BCYX)

    def by_kernel(self, x_BCYX: Tensor) -> Tensor:
        """For CPUs: torch's kernel norms the band by its own statistics several times faster than sums find these alone."""
        norm, (B, C, Y, X), x = self.norm, x_BCYX.shape, x_BCYX.float()
        last = x.stride() == (C * Y * X, 1, C * X, C)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        x, mean_BG, rate_BG = torch.native_group_norm(x, None, None, B, C, Y * X, norm.num_groups, norm.eps)
        own_2BG = torch.stack([mean_BG, rate_BG.square().reciprocal() - norm.eps])
        mean, var = self._whole(own_2BG, self.band.rows_like(x_BCYX))
        rate = torch.rsqrt(var + norm.eps)
        return self._scaled(x, rate / rate_BG, (mean_BG - mean) * rate, out=x).to(x_BCYX.dtype)

    def by_sums(self, x_BCYX: Tensor) -> Tensor:
        """For GPUs, whose kernels compute in fp32 while they read and write half precision: no copy of x is made."""
        own_2BG = moments(x_BCYX, self.norm.num_groups)
        mean, var = self._whole(own_2BG, self.band.rows_like(x_BCYX))
        rate = torch.rsqrt(var + self.norm.eps)
        return self._scaled(x_BCYX, rate, -mean * rate, out=torch.empty_like(x_BCYX))

    def _scaled(self, x_BCYX: Tensor, scale_BG: Tensor, shift_BG: Tensor, out: Tensor) -> Tensor:
        """x * scale + shift, and then the layer's own weight and bias."""
        norm, per_group = self.norm, x_BCYX.shape[1] // self.norm.num_groups
        scale, shift = (part.repeat_interleave(per_group, 1) for part in (scale_BG, shift_BG))
        if norm.weight is not None:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        return torch.addcmul(shift[:, :, None, None], x_BCYX, scale[:, :, None, None], out=out)

    def _whole(self, own_2BG: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, G) of the whole image from this band's."""
        band, stale, place = self.band, self.band.step.stale, (self.slot, self.band.step.branch)
        if stale is None or band.step.phase == "sync":
            every = all_gather(own_2BG.unsqueeze(0), 0, [1] * band.axis.degree, band.axis)
            if stale is not None:
                stale.keep_gathered(place, every.unbind(0))
            return _combined(every, rows)
        every = torch.stack(stale.swap_gathered(place, own_2BG, [own_2BG.shape] * band.axis.degree))
        mean, var = _combined(every, rows)
        before = every[band.axis.rank]
        moved_mean = mean + own_2BG[0] - before[0]
        square = var + mean.square() + (own_2BG[1] + own_2BG[0].square()) - (before[1] + before[0].square())
        moved_var = square - moved_mean.square()
        # Far from the last evaluation the estimate can turn negative; the paper then takes the band's own.
        return moved_mean, torch.where(moved_var > 0, moved_var, own_2BG[1])


def moments(x_BCYX: Tensor, groups: int) -> Tensor:
    """Mean and biased variance (2, B, G), in fp32.

    A GPU adds half precision up in fp32 as it reads it, without a copy. There the squares are those of x, which is good to a
    percent of the variance where the mean is a hundred times the deviation, and far better for what models have. In fp32 they
    are those of the distances from the mean, which take the room of x for a while.
    """
    x, half = x_BCYX.unflatten(1, (groups, -1)), x_BCYX.dtype != torch.float32
    mean = x.mean((2, 3, 4), keepdim=True, dtype=torch.float32)
    root = torch.linalg.vector_norm(x if half else x - mean, dim=(2, 3, 4), dtype=torch.float32)
    square, mean = root.square() / (x.numel() // root.numel()), mean.flatten(1)
    return torch.stack([mean, (square - mean.square()).clamp_(min=0) if half else square])


def _combined(every_R2BG: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all bands together from each band's, weighted by rows."""
    share = _shares(tuple(rows), every_R2BG.device)
    mean = (share * every_R2BG[:, 0]).sum(0)
    return mean, (share * (every_R2BG[:, 1] + (every_R2BG[:, 0] - mean) ** 2)).sum(0)


@lru_cache(maxsize=64)
def _shares(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """(R, 1, 1). To put numbers on a GPU anew for each norm would stop the host each time."""
    weights = torch.tensor(rows, dtype=torch.float32)
    return (weights / weights.sum()).view(-1, 1, 1).to(device)


class BandImageAttention(nn.Module):
    """A VAE's single-head attention over the image: a band's queries, the whole image's keys and values.

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
        # One head of its own axis: torch's fused kernels take nothing else, and its plain one makes the whole L x L table.
        q_B1LC, k_B1LC, v_B1LC = (x.unsqueeze(1) for x in (inner.to_q(tokens_BLC), *kv))
        out = F.scaled_dot_product_attention(q_B1LC, k_B1LC, v_B1LC).squeeze(1)
        out = inner.to_out[0](out).transpose(1, 2).reshape(B, C, Y, X)
        return (out + hidden_states) / inner.rescale_output_factor


class BandSelfAttention:
    """Processor of a UNet's self-attention: a band's queries, the whole image's keys and values.

    The attention has one product for queries, keys and values, `to_qkv`.
    Comm: keys and values to every rank, 2 * B * L * D elements; in displaced steps they arrive late.
    """

    def __init__(self, band: Band, kernel: str, slot: str) -> None:
        self.band, self.kernel, self.slot = band, kernel, slot

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        if self.band.axis.degree > 1:
            k, v = self._whole(torch.stack([k, v])).unbind(0)
        return attn.to_out[0](_attend(q, k, v, attn.heads, self.kernel))

    @breaks_graph
    def _whole(self, own_2BLD: Tensor) -> Tensor:
        """Keys and values of the whole image; the order of bands doesn't matter to attention."""
        band, stale, place = self.band, self.band.step.stale, (self.slot, self.band.step.branch)
        tokens = band.tokens_like(own_2BLD[0])
        if stale is None:
            return all_gather(own_2BLD, 2, tokens, band.axis)
        return stale.joined(place, own_2BLD, 2, tokens, band.step.phase)


class CachedCrossAttention:
    """Processor of a UNet's attention to the prompt, whose keys and values are there before an evaluation.

    The attention has one product for keys and values, `to_kv`, which makes them.
    """

    def __init__(self, band: Band, kernel: str, slot: str) -> None:
        self.band, self.kernel, self.slot = band, kernel, slot

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        k, v = self._keys_values().chunk(2, dim=-1)
        return attn.to_out[0](_attend(attn.to_q(hidden_states), k, v, attn.heads, self.kernel))

    @breaks_graph
    def _keys_values(self) -> Tensor:
        return self.band.prompt_kv[self.slot]


def _attend(q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, heads: int, kernel: str) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q_BLD, k_BLD, v_BLD))
    return attend(kernel, q, k, v).flatten(2)


def place_band_layers(module: nn.Module, band: Band, kernel: str = "native", path: str = "") -> None:
    """Every layer below `module` that looks beyond its own rows is put in its banded form; weights stay.

    A UNet's attentions must have joint projections already: see `join_projections`.
    """
    for name, child in module.named_children():
        slot = f"{path}.{name}"
        if isinstance(child, Downsample2D) and child.padding == 0:
            setattr(module, name, BandDownsample(child, band))
            continue
        place_band_layers(child, band, kernel, slot)
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
