"""Group norm of a band by the whole image's statistics, with what follows it in a network.

Shapes: B batch, C channels, Y rows of the band, X columns, G groups, R ranks, S parts of the pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused.group_norm import (
    MESSAGE,
    MOMENTS,
    NORM,
    blank_with_rows,
    by_channel,
    combined,
    message_size,
    moved,
    part_sizes,
    shares_of,
    statistics_size,
    write_edges,
    write_rows,
)
from .band import Band
from .graph_breaks import breaks_graph
from .sites import NormRows


class BandGroupNorm(nn.Module):
    """Group norm with the whole image's mean and biased variance, in fp32; with SiLU where `activated`.

    Where a convolution follows, it gives the rows of `halo` around the band as well: they come as they are, with the bands'
    statistics, and are normed here. Zeros where the image ends. In displaced steps rows and statistics are the last evaluation's,
    the statistics moved as far as this band's own have moved since (DistriFusion, section 4).
    Comm: 2 * B * G numbers and B * C * X elements for each row of `halo` to every rank, in one exchange.
    """

    def __init__(
        self, norm: nn.GroupNorm, band: Band, slot: str, *, activated: bool = False, halo: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.norm, self.band, self.slot, self.activated, self.halo = norm, band, slot, activated, halo

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """(B, C, above + Y + below, X)."""
        if self.band.sites is not None and self.band.sites.norm_rows is not None:
            return self._with_other_rows(x_BCYX, self.band.sites.norm_rows)
        if x_BCYX.device.type != "cpu":
            return self.by_kernels(x_BCYX)
        if self.band.axis.degree > 1:
            return self.on_cpu(x_BCYX)
        out = self.norm(x_BCYX)
        return F.silu(out, inplace=True) if self.activated else out

    @breaks_graph
    def _with_other_rows(self, x_BCYX: Tensor, others: NormRows) -> Tensor:
        return self.by_kernels(x_BCYX, others)

    def by_kernels(self, x_BCYX: Tensor, others: NormRows | None = None) -> Tensor:
        """For GPUs, whose kernels compute in fp32 while they read and write half precision: no copy of x is made.

        Args:
            others: whose statistics count as much as a row's own, where they do.
        """
        norm = self.norm
        shares = shares_of(part_sizes(x_BCYX.shape[2] * x_BCYX.shape[3]), x_BCYX.device)
        every = MOMENTS(x_BCYX, norm.num_groups)
        fresh = top = bottom = None
        above = below = 0
        if self.band.axis.degree > 1:
            above, below = self.halo
            told, fresh = self._told(x_BCYX, every, shares)
            every, top, bottom = self._read(told, x_BCYX)
            shares = self.band.shares_like(x_BCYX)
        if others is not None:
            every, shares = torch.cat([every, others(every)]), torch.cat([shares, shares]) / 2
        rank, edges = self.band.axis.rank, (above, below, top, bottom)
        return NORM(x_BCYX, every, shares, fresh, rank, norm.weight, norm.bias, norm.eps, self.activated, *edges)

    def on_cpu(self, x_BCYX: Tensor) -> Tensor:
        """For CPUs: torch's kernel norms the band by its own statistics several times faster than sums find these alone."""
        norm, (B, C, Y, X), x = self.norm, x_BCYX.shape, x_BCYX.float()
        last = x.stride() == (C * Y * X, 1, C * X, C)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        x, mean_BG, rate_BG = torch.native_group_norm(x, None, None, B, C, Y * X, norm.num_groups, norm.eps)
        own_12BG = torch.stack([mean_BG, rate_BG.square().reciprocal() - norm.eps]).unsqueeze(0)
        told, fresh = self._told(x_BCYX, own_12BG, shares_of((1,), x.device))
        every, top, bottom = self._read(told, x_BCYX)
        mean, var = combined(every, self.band.shares_like(x_BCYX))
        if fresh is not None:
            mean, var = moved(mean, var, fresh, every[self.band.axis.rank])
        rate = torch.rsqrt(var + norm.eps)
        out = blank_with_rows(x, *self.halo)
        write_rows(
            out,
            x,
            self.halo[0],
            *by_channel(rate / rate_BG, (mean_BG - mean) * rate, norm.weight, norm.bias, C),
            self.activated,
        )
        raw = by_channel(rate, -mean * rate, norm.weight, norm.bias, C)
        write_edges(out, *raw, self.activated, *self.halo, top, bottom)
        return out.to(x_BCYX.dtype)

    def _told(self, x_BCYX: Tensor, parts_S2BG: Tensor, shares_S: Tensor) -> tuple[Tensor, Tensor | None]:
        """Every band's message (R, N), and this band's fresh statistics (2, B, G) where the message is not."""
        size = message_size(x_BCYX, self.norm.num_groups, *self.halo)
        band, stale = self.band, self.band.step.stale
        if stale is None or band.step.phase == "sync":
            message = x_BCYX.new_empty(size)
            MESSAGE(parts_S2BG, shares_S, x_BCYX, *self.halo, message)
            return band.tell(self.slot, message).wait(), None
        sent: list[Tensor] = []

        def write(message_N: Tensor) -> None:
            MESSAGE(parts_S2BG, shares_S, x_BCYX, *self.halo, message_N)
            sent.append(message_N)

        every = stale.swap(self.slot, write)
        return every, self._statistics(sent[0].unsqueeze(0), x_BCYX)[0]

    def _read(self, every_RN: Tensor, x_BCYX: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of every band's message its statistics (R, 2, B, G), and the rows above and below this band."""
        size = statistics_size(x_BCYX, self.norm.num_groups)
        facing = self.band.facing(every_RN[:, size:], x_BCYX, *self.halo)
        return self._statistics(every_RN, x_BCYX), *facing

    def _statistics(self, every_RN: Tensor, x_BCYX: Tensor) -> Tensor:
        groups = self.norm.num_groups
        numbers = every_RN[:, : statistics_size(x_BCYX, groups)].view(torch.float32)
        return numbers.unflatten(1, (2, x_BCYX.shape[0], groups))
