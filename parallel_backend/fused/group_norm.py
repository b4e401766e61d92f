"""Group norm of a part of an image, in three kernels: what the part tells the others of itself, and the part normed.

Half precision is read and written as it is and computed in fp32. Images lie channels last.
Shapes: B batch, C channels, Y rows, X columns, G groups, S parts of the pixels, R ranks, N numbers of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operation import Fused

# Parts of the pixels whose moments are computed apart: one program for a group would leave most of a GPU idle.
SPLITS = 8
_LAST = torch.channels_last


# -- moments ----------------------------------------------------------------------------------------------------------


def _moments(x_BCYX: Tensor, groups: int) -> Tensor:
    parts = x_BCYX.flatten(2).split(part_sizes(x_BCYX.shape[2] * x_BCYX.shape[3]), dim=2)
    found = []
    for part in parts:
        values = part.unflatten(1, (groups, -1)).float()
        count = max(1, values[0, 0].numel())
        mean = values.sum((2, 3), keepdim=True) / count
        found.append(torch.stack([mean.flatten(1), (values - mean).square().sum((2, 3)) / count]))
    return torch.stack(found)


def part_sizes(pixels: int) -> tuple[int, ...]:
    """How many of so many pixels each part has."""
    return tuple((split + 1) * pixels // SPLITS - split * pixels // SPLITS for split in range(SPLITS))


def _launch_moments(x_BCYX: Tensor, groups: int) -> Tensor:
    from .group_norm_kernels import moments_kernel, next_power_of_2

    x = x_BCYX.contiguous(memory_format=_LAST)
    B, C, Y, X = x.shape
    out = x.new_empty(SPLITS, 2, B, groups, dtype=torch.float32)
    channels = next_power_of_2(C // groups)
    block = max(16, 4096 // channels)
    moments_kernel[(B * groups, SPLITS)](x, out, Y * X, C, groups, BLOCK_P=block, BLOCK_C=channels, SPLITS=SPLITS)
    return out


def _some(device: torch.device, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    x = torch.randn(*shape, generator=generator).to(device, dtype)
    return x.contiguous(memory_format=_LAST) if x.ndim == 4 else x


MOMENTS = Fused(
    "group_moments",
    "(Tensor x, int groups) -> Tensor",
    _moments,
    _launch_moments,
    lambda device: [_some(device, 2, 96, 5, 7), 32],
)


# -- message ----------------------------------------------------------------------------------------------------------


def _write_message(parts_S2BG: Tensor, shares_S: Tensor, x_BCYX: Tensor, above: int, below: int, out_N: Tensor) -> None:
    own = torch.stack(combined(parts_S2BG, shares_S))
    torch.cat([own.flatten().view(x_BCYX.dtype), *facing_parts(x_BCYX, above, below)], out=out_N)


def facing_parts(x_BCYX: Tensor, above: int, below: int) -> list[Tensor]:
    """What the bands around this one see of it: of every picture the first `below` rows, flat, and its last `above`."""
    rows = x_BCYX.permute(0, 2, 3, 1)
    return [row.reshape(-1) for row in (*rows[:, :below], *rows[:, rows.shape[1] - above :])]


def _launch_message(
    parts_S2BG: Tensor, shares_S: Tensor, x_BCYX: Tensor, above: int, below: int, out_N: Tensor
) -> None:
    from .group_norm_kernels import cdiv, message_kernel, next_power_of_2

    x = x_BCYX.contiguous(memory_format=_LAST)
    B, C, Y, X = x.shape
    numbers, size = parts_S2BG[0].numel(), statistics_size(x, parts_S2BG.shape[3])
    block = 1024
    grid = (1 + B * (above + below) * cdiv(X * C, block),)
    message_kernel[grid](
        parts_S2BG,
        shares_S,
        x,
        out_N[:size].view(torch.float32),
        out_N[size:],
        *(parts_S2BG.shape[0], B, Y, X * C, above, below, numbers // 2),
        BLOCK=block,
        BLOCK_BG=next_power_of_2(numbers // 2),
    )


MESSAGE = Fused(
    "band_message",
    "(Tensor parts, Tensor shares, Tensor x, int above, int below, Tensor(a!) out) -> ()",
    _write_message,
    _launch_message,
    lambda device: _message_trial(device),
)


def _message_trial(device: torch.device) -> Sequence[Any]:
    x = _some(device, 2, 64, 4, 6, dtype=torch.float32)  # as fp32 is all of a message then
    parts = _some(device, 3, 2, 2, 32, dtype=torch.float32).abs()
    shares = torch.tensor([0.5, 0.25, 0.25], device=device)
    return [parts, shares, x, 1, 1, x.new_empty(message_size(x, 32, 1, 1))]


def message_size(x_BCYX: Tensor, groups: int, above: int, below: int) -> int:
    """N, in elements of `x`: mean and variance in fp32, then rows."""
    B, C, _, X = x_BCYX.shape
    return statistics_size(x_BCYX, groups) + B * (above + below) * X * C


def statistics_size(x_BCYX: Tensor, groups: int) -> int:
    """Elements of `x` whose bytes hold mean and variance of all groups in fp32."""
    return 2 * x_BCYX.shape[0] * groups * torch.float32.itemsize // x_BCYX.itemsize


def combined(every_R2BG: Tensor, shares_R: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all parts together, around their common mean, so that nothing cancels (Chan et al. 1979)."""
    share = shares_R.view(-1, 1, 1)
    mean = (share * every_R2BG[:, 0]).sum(0)
    return mean, (share * (every_R2BG[:, 1] + (every_R2BG[:, 0] - mean) ** 2)).sum(0)


def moved(mean_BG: Tensor, var_BG: Tensor, fresh_2BG: Tensor, before_2BG: Tensor) -> tuple[Tensor, Tensor]:
    """The whole image's last mean and variance, moved as far as one band's own have moved since.

    Source: DistriFusion (Li et al. 2024), section 4. Where the estimate turns negative, the paper takes the band's own.
    """
    mean = mean_BG + fresh_2BG[0] - before_2BG[0]
    square = var_BG + mean_BG.square() + (fresh_2BG[1] + fresh_2BG[0].square())
    var = square - (before_2BG[1] + before_2BG[0].square()) - mean.square()
    return mean, torch.where(var > 0, var, fresh_2BG[1])


# -- norm -------------------------------------------------------------------------------------------------------------


def _normed(
    x_BCYX: Tensor,
    every_R2BG: Tensor,
    shares_R: Tensor,
    fresh_2BG: Tensor | None,
    rank: int,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    activated: bool,
    above: int,
    below: int,
    top_BYXC: Tensor | None,
    bottom_BYXC: Tensor | None,
) -> Tensor:
    mean, var = combined(every_R2BG, shares_R)
    if fresh_2BG is not None:
        mean, var = moved(mean, var, fresh_2BG, every_R2BG[rank])
    rate = torch.rsqrt(var + eps)
    scale, shift = by_channel(rate, -mean * rate, weight_C, bias_C, x_BCYX.shape[1])
    out = blank_with_rows(x_BCYX, above, below)
    write_rows(out, x_BCYX, above, scale, shift, activated)
    write_edges(out, scale, shift, activated, above, below, top_BYXC, bottom_BYXC)
    return out


def by_channel(
    scale_BG: Tensor, shift_BG: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, channels: int
) -> tuple[Tensor, Tensor]:
    """x * scale + shift and then the layer's own weight and bias, as one scale and shift (B, C, 1, 1)."""
    scale, shift = (part.repeat_interleave(channels // part.shape[1], 1) for part in (scale_BG, shift_BG))
    if weight_C is not None and bias_C is not None:
        scale, shift = scale * weight_C, shift * weight_C + bias_C
    return scale[:, :, None, None], shift[:, :, None, None]


def blank_with_rows(x_BCYX: Tensor, above: int, below: int) -> Tensor:
    """Room for `x` and rows around it."""
    B, C, Y, X = x_BCYX.shape
    layout = (
        torch.contiguous_format if x_BCYX.is_contiguous() and not x_BCYX.is_contiguous(memory_format=_LAST) else _LAST
    )
    return torch.empty(B, C, above + Y + below, X, dtype=x_BCYX.dtype, device=x_BCYX.device, memory_format=layout)


def write_rows(
    out_BCYX: Tensor, x_BCYX: Tensor, at: int, scale_BC11: Tensor, shift_BC11: Tensor, activated: bool
) -> None:
    """x * scale + shift, with SiLU where `activated`, from row `at` of `out` on."""
    rows = out_BCYX.narrow(2, at, x_BCYX.shape[2])
    torch.addcmul(shift_BC11, x_BCYX, scale_BC11, out=rows)
    if activated:
        F.silu(rows, inplace=True)


def write_edges(
    out_BCYX: Tensor,
    scale_BC11: Tensor,
    shift_BC11: Tensor,
    activated: bool,
    above: int,
    below: int,
    top_BYXC: Tensor | None,
    bottom_BYXC: Tensor | None,
) -> None:
    """The rows around the band: the neighbours', normed as its own are; zeros where the image ends, as convolutions pad it."""
    for at, count, rows in ((0, above, top_BYXC), (out_BCYX.shape[2] - below, below, bottom_BYXC)):
        if rows is not None:
            write_rows(out_BCYX, rows.permute(0, 3, 1, 2), at, scale_BC11, shift_BC11, activated)
        elif count:
            out_BCYX.narrow(2, at, count).zero_()


def _launch_norm(
    x_BCYX: Tensor,
    every_R2BG: Tensor,
    shares_R: Tensor,
    fresh_2BG: Tensor | None,
    rank: int,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    activated: bool,
    above: int,
    below: int,
    top_BYXC: Tensor | None,
    bottom_BYXC: Tensor | None,
) -> Tensor:
    from .group_norm_kernels import cdiv, norm_kernel

    x = x_BCYX.contiguous(memory_format=_LAST)
    B, C, Y, X = x.shape
    rows = above + Y + below
    out = torch.empty(B, C, rows, X, dtype=x.dtype, device=x.device, memory_format=_LAST)
    columns, channels = 32, 64
    norm_kernel[(B * rows, cdiv(X, columns), cdiv(C, channels))](
        x,
        out,
        every_R2BG,
        shares_R,
        every_R2BG if fresh_2BG is None else fresh_2BG,
        x if weight_C is None else weight_C,
        x if bias_C is None else bias_C,
        x if top_BYXC is None else top_BYXC,
        x if bottom_BYXC is None else bottom_BYXC,
        *(every_R2BG.shape[0], every_R2BG.stride(0), rank, B, C, Y, X, every_R2BG.shape[3], above, below, eps),
        MOVED=fresh_2BG is not None,
        SCALED=weight_C is not None,
        ACTIVATED=activated,
        HAS_TOP=top_BYXC is not None,
        HAS_BOTTOM=bottom_BYXC is not None,
        BLOCK_X=columns,
        BLOCK_C=channels,
    )
    return out


NORM = Fused(
    "band_norm",
    "(Tensor x, Tensor every, Tensor shares, Tensor? fresh, int rank, Tensor? weight, Tensor? bias, float eps, "
    "bool activated, int above, int below, Tensor? top, Tensor? bottom) -> Tensor",
    _normed,
    _launch_norm,
    lambda device: _norm_trial(device),
)


def _norm_trial(device: torch.device) -> Sequence[Any]:
    x, row = _some(device, 2, 96, 4, 6), _some(device, 2, 1, 6, 96)
    every = _some(device, 3, 2, 2, 32, dtype=torch.float32).abs() + 0.5
    weight, bias = _some(device, 96), _some(device, 97)[1:]
    return [x, every, shares_of((5, 4, 3), device), every[0], 1, weight, bias, 1e-5, True, 1, 1, row.contiguous(), None]


@cache
def shares_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(R,), fp32: the share that each size has. To put numbers on a GPU anew for each norm would stop the host each time.

    They stay for good: a graph knows them by their place.
    """
    weights = torch.tensor(sizes, dtype=torch.float32)
    return (weights / weights.sum()).to(device)
