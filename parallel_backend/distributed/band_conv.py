"""Convolutions of a band: those that the whole image's would give for its rows.

Shapes: B batch, C channels, Y rows of the band, X columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from .band import Band, facing_rows, with_rows_around


class BandConv2d(nn.Module):
    """A convolution of a band. Only the last band's height may not be a multiple of the stride.

    While the rows around it are on their way, the band is convolved as if the image ended at its edges; then the rows whose
    result these change are convolved once more. Rows that are there already are convolved with it.
    Comm: `padding` rows from above, kernel - stride - padding rows from below; in displaced steps they arrive late.
    """

    def __init__(self, conv: nn.Conv2d, band: Band, slot: str) -> None:
        super().__init__()
        assert isinstance(conv.padding, tuple) and conv.dilation == (1, 1)
        assert isinstance(conv.kernel_size, tuple) and isinstance(conv.stride, tuple)
        self.conv, self.band, self.slot = conv, band, slot
        (self.rows, _), (self.stride, _), (self.padding, self.columns) = conv.kernel_size, conv.stride, conv.padding
        self.halo = (self.padding, max(0, self.rows - self.stride - self.padding))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.band.axis.degree == 1 or not any(self.halo):
            return self.conv(x_BCYX)
        told = self.band.tell(self.slot, facing_rows(x_BCYX, *self.halo))
        if not told.works or x_BCYX.shape[2] < self.rows:
            return self._whole(x_BCYX, *self.band.facing(told.wait(), x_BCYX, *self.halo))
        out = self.conv(x_BCYX)
        top, bottom = self.band.facing(told.wait(), x_BCYX, *self.halo)
        return self._with_edges(out, x_BCYX, top, bottom)

    def _whole(self, x_BCYX: Tensor, top: Tensor | None, bottom: Tensor | None) -> Tensor:
        """Of a band whose every row may see rows on both sides."""
        x = with_rows_around(x_BCYX, *self.halo, top, bottom)
        # Below an odd height a strided kernel looks at one more row, which lies outside the image.
        outside = x_BCYX.shape[2] % self.stride
        return self.of_rows(F.pad(x, (0, 0, 0, outside)) if outside else x)

    def _with_edges(self, out_BCYX: Tensor, x_BCYX: Tensor, top: Tensor | None, bottom: Tensor | None) -> Tensor:
        above, below = self.halo
        if top is not None:
            changed = -(-above // self.stride)
            seen = x_BCYX[:, :, : (changed - 1) * self.stride + self.rows - above]
            out_BCYX[:, :, :changed] = self.of_rows(with_rows_around(seen, above, 0, top, None))
        if bottom is not None:
            # They are there with stride 1 alone.
            seen = x_BCYX[:, :, x_BCYX.shape[2] - self.rows + 1 :]
            out_BCYX[:, :, out_BCYX.shape[2] - below :] = self.of_rows(with_rows_around(seen, 0, below, None, bottom))
        return out_BCYX

    def of_rows(self, x_BCYX: Tensor) -> Tensor:
        """Of rows that have what is around them with them."""
        conv = self.conv
        return F.conv2d(x_BCYX, conv.weight, conv.bias, conv.stride, (0, self.columns), groups=conv.groups)


class BandUpsamplingConv2d(BandConv2d):
    """A convolution with the upsampling by 2 before it, whose result, the largest tensor of a decode, nobody else holds.

    Comm: a row for two, before they are doubled.
    """

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.band.axis.degree == 1:
            return self.conv(_doubled(x_BCYX))
        small = -(-self.halo[0] // 2), -(-self.halo[1] // 2)
        told = self.band.tell(self.slot, facing_rows(x_BCYX, *small))
        x = _doubled(x_BCYX)
        early = self.conv(x) if told.works and x.shape[2] >= self.rows else None
        top, bottom = self.band.facing(told.wait(), x_BCYX, *small)
        if top is not None:
            top = _doubled_rows(top)[:, -self.halo[0] :]
        if bottom is not None:
            bottom = _doubled_rows(bottom)[:, : self.halo[1]]
        return self._whole(x, top, bottom) if early is None else self._with_edges(early, x, top, bottom)


def _doubled(x_BCYX: Tensor) -> Tensor:
    return F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest")


def _doubled_rows(rows_BYXC: Tensor) -> Tensor:
    return _doubled(rows_BYXC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class NormedRowsConv2d(BandConv2d):
    """A convolution after a `BandGroupNorm` that gives it the rows around the band as well.

    Comm: none.
    """

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.conv(x_BCYX) if self.band.axis.degree == 1 else self.of_rows(x_BCYX)


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


class BandDownsample(nn.Module):
    """diffusers' Downsample2D without padding of its own: one zero row below and column right of the whole image.

    Comm: a row from below.
    """

    def __init__(self, downsample: Downsample2D, band: Band, slot: str) -> None:
        super().__init__()
        conv = downsample.conv
        assert isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (2, 2)
        self.conv, self.band, self.slot = conv, band, slot

    def forward(self, x_BCYX: Tensor) -> Tensor:
        bottom = None
        if self.band.axis.degree > 1:
            told = self.band.tell(self.slot, facing_rows(x_BCYX, 0, 1)).wait()
            bottom = self.band.facing(told, x_BCYX, 0, 1)[1]
        return self.conv(F.pad(with_rows_around(x_BCYX, 0, 1, None, bottom), (0, 1, 0, 0)))
