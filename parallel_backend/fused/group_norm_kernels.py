"""Triton's kernels of group_norm.py. Images are (B, Y, X, C) in memory; arithmetic is in fp32.

Imported when a GPU first norms a band: Triton isn't there on every machine.
"""

# Triton's language has no types that mypy knows.
# mypy: ignore-errors

import triton
import triton.language as tl

cdiv, next_power_of_2 = triton.cdiv, triton.next_power_of_2


@triton.jit
def moments_kernel(x, out, pixels, C, groups, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr):
    """Mean and variance of one group in one part of the pixels; tiles are joined around their common mean."""
    row, split = tl.program_id(0), tl.program_id(1)
    per_group = C // groups
    channel = tl.arange(0, BLOCK_C)
    first, last = split * pixels // SPLITS, (split + 1) * pixels // SPLITS
    base = x + (row // groups).to(tl.int64) * pixels * C + (row % groups) * per_group
    seen, mean, m2 = 0.0, 0.0, 0.0
    for start in range(first, last, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        mask = (pixel < last)[:, None] & (channel < per_group)[None, :]
        at = pixel.to(tl.int64)[:, None] * C + channel[None, :]
        values = tl.load(base + at, mask=mask, other=0.0).to(tl.float32)
        count = (tl.minimum(BLOCK_P, last - start) * per_group).to(tl.float32)
        tile_mean = tl.sum(tl.sum(values, 1), 0) / count
        distance = tl.where(mask, values - tile_mean, 0.0)
        moved = tile_mean - mean
        together = seen + count
        m2 += tl.sum(tl.sum(distance * distance, 1), 0) + moved * moved * seen * count / together
        mean += moved * count / together
        seen = together
    rows = tl.num_programs(0)
    tl.store(out + split * 2 * rows + row, mean)
    tl.store(out + (split * 2 + 1) * rows + row, m2 / tl.maximum(seen, 1.0))


@triton.jit
def _joined(parts, shares, count, stride, BG, group, known, BLOCK: tl.constexpr):
    """Mean and variance of some groups over all parts together: see `combined`."""
    mean = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        mean += tl.load(shares + part) * tl.load(parts + part * stride + group, mask=known, other=0.0)
    var = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        distance = tl.load(parts + part * stride + group, mask=known, other=0.0) - mean
        own = tl.load(parts + part * stride + BG + group, mask=known, other=0.0)
        var += tl.load(shares + part) * (own + distance * distance)
    return mean, var


@triton.jit
def message_kernel(
    parts, shares, x, moments, facing, S, B, Y, row_size, above, below, BG, BLOCK: tl.constexpr, BLOCK_BG: tl.constexpr
):
    """The first program joins the parts' moments; each other one copies a piece of a row."""
    program = tl.program_id(0)
    if program == 0:
        group = tl.arange(0, BLOCK_BG)
        known = group < BG
        mean, var = _joined(parts, shares, S, 2 * BG, BG, group, known, BLOCK_BG)
        tl.store(moments + group, mean, mask=known)
        tl.store(moments + BG + group, var, mask=known)
    else:
        pieces = tl.cdiv(row_size, BLOCK)
        row, piece = (program - 1) // pieces, (program - 1) % pieces
        # The first rows of every picture come first, then the last ones of every picture.
        if row < B * below:
            b, y = row // below, row % below
        else:
            b, y = (row - B * below) // above, Y - above + (row - B * below) % above
        at = piece * BLOCK + tl.arange(0, BLOCK)
        mask = at < row_size
        values = tl.load(x + (b * Y + y).to(tl.int64) * row_size + at, mask=mask)
        tl.store(facing + row.to(tl.int64) * row_size + at, values, mask=mask)


@triton.jit
def norm_kernel(
    x,
    out,
    every,
    shares,
    fresh,
    weight,
    bias,
    top,
    bottom,
    R,
    every_stride,
    rank,
    B,
    C,
    Y,
    X,
    groups,
    above,
    below,
    eps,
    MOVED: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    HAS_TOP: tl.constexpr,
    HAS_BOTTOM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A piece of one row of the band, or of the rows around it."""
    rows = above + Y + below
    b, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    column = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    BG, at = B * groups, b * groups + channel // (C // groups)

    mean, var = _joined(every, shares, R, every_stride, BG, at, known, BLOCK_C)
    if MOVED:
        before_mean = tl.load(every + rank * every_stride + at, mask=known, other=0.0)
        before_var = tl.load(every + rank * every_stride + BG + at, mask=known, other=0.0)
        fresh_mean = tl.load(fresh + at, mask=known, other=0.0)
        fresh_var = tl.load(fresh + BG + at, mask=known, other=0.0)
        moved = mean + fresh_mean - before_mean
        square = var + mean * mean + (fresh_var + fresh_mean * fresh_mean) - (before_var + before_mean * before_mean)
        var = square - moved * moved
        var = tl.where(var > 0, var, fresh_var)
        mean = moved
    scale = 1.0 / tl.sqrt(var + eps)
    shift = -mean * scale
    if SCALED:
        factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
        scale = scale * factor
        shift = shift * factor + tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)

    mask = (column < X)[:, None] & known[None, :]
    place = column[:, None] * C + channel[None, :]
    line = X * C
    if row < above:
        values = tl.load(top + (b * above + row).to(tl.int64) * line + place, mask=mask & HAS_TOP, other=0.0)
        outside = not HAS_TOP
    elif row >= above + Y:
        beyond = row - above - Y
        values = tl.load(bottom + (b * below + beyond).to(tl.int64) * line + place, mask=mask & HAS_BOTTOM, other=0.0)
        outside = not HAS_BOTTOM
    else:
        values = tl.load(x + (b * Y + row - above).to(tl.int64) * line + place, mask=mask, other=0.0)
        outside = False
    result = values.to(tl.float32) * scale[None, :] + shift[None, :]
    if ACTIVATED:
        result = result * tl.sigmoid(result)
    result = tl.where(outside, 0.0, result)
    tl.store(out + (b * rows + row).to(tl.int64) * line + place, result.to(out.dtype.element_ty), mask=mask)
