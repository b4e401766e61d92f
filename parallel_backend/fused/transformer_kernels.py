"""The Triton kernels of the transformers. Only what launches them imports this.

Names in capitals are constants of a compiled kernel.
"""

# Triton's language has no types that mypy knows, and its compiler no other names in signatures than its own.
# mypy: ignore-errors

import triton
import triton.language as tl

# One program works on one token of one row.


@triton.jit
def modulated_norm_kernel(
    x,
    shift,
    scale,
    out,
    shift_2,
    scale_2,
    out_2,
    shift_row,
    scale_row,
    shift_2_row,
    scale_2_row,
    length,
    width,
    eps,
    TWICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = token // length
    at = tl.arange(0, BLOCK)
    is_here = at < width
    values = tl.load(x + token * width + at, mask=is_here, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(is_here, values - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    shifts = tl.load(shift + row * shift_row + at, mask=is_here, other=0.0).to(tl.float32)
    scales = tl.load(scale + row * scale_row + at, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out + token * width + at, (normed * (1.0 + scales) + shifts).to(out.dtype.element_ty), mask=is_here)
    if TWICE:
        shifts = tl.load(shift_2 + row * shift_2_row + at, mask=is_here, other=0.0).to(tl.float32)
        scales = tl.load(scale_2 + row * scale_2_row + at, mask=is_here, other=0.0).to(tl.float32)
        tl.store(out_2 + token * width + at, (normed * (1.0 + scales) + shifts).to(out.dtype.element_ty), mask=is_here)


@triton.jit
def _first_and_count(head, BASE: tl.constexpr, MORE: tl.constexpr):
    """Of the part that a head is in: its first head, and how many it has."""
    large: tl.constexpr = MORE * (BASE + 1)
    first = tl.where(head < large, head // (BASE + 1) * (BASE + 1), large + (head - large) // BASE * BASE)
    return first, tl.where(head < large, BASE + 1, BASE)


@triton.jit
def _move(
    source,
    weight,
    target,
    from_,
    to,
    dim,
    is_here,
    eps,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
):
    values = tl.load(source + from_, mask=is_here, other=0.0)
    if NORM:
        wide = values.to(tl.float32)
        rate = tl.rsqrt(tl.sum(wide * wide, 1) / HEAD_DIM + eps)
        factor = tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        values = (wide * rate[:, None] * factor).to(target.dtype.element_ty)
    tl.store(target + to, values, mask=is_here)


@triton.jit
def join_kernel(
    q,
    k,
    v,
    q_2,
    k_2,
    v_2,
    q_weight,
    k_weight,
    q_2_weight,
    k_2_weight,
    sent,
    row_stride,
    token_stride,
    row_stride_2,
    token_stride_2,
    rows,
    length,
    length_2,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BASE: tl.constexpr,
    MORE: tl.constexpr,
    FIRST_NORM: tl.constexpr,
    SECOND_NORM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)  # tokens outside, rows inside, as messages lie
    part = tl.program_id(1)
    token, row = place // rows, place % rows
    head, dim = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, DIM_BLOCK)[None, :]
    is_here = (head < HEADS) & (dim < HEAD_DIM)
    first, count = _first_and_count(head, BASE, MORE)
    of_part = first.to(tl.int64) * (length + length_2) * rows * (3 * HEAD_DIM)
    to = of_part + ((place * 3 + part) * count + head - first) * HEAD_DIM + dim
    inside = head * HEAD_DIM + dim
    if token < length:
        from_ = row * row_stride + token * token_stride + inside
        if part == 0:
            _move(q, q_weight, sent, from_, to, dim, is_here, eps, HEAD_DIM, FIRST_NORM)
        elif part == 1:
            _move(k, k_weight, sent, from_, to, dim, is_here, eps, HEAD_DIM, FIRST_NORM)
        else:
            _move(v, q_weight, sent, from_, to, dim, is_here, eps, HEAD_DIM, False)
    else:
        from_ = row * row_stride_2 + (token - length) * token_stride_2 + inside
        if part == 0:
            _move(q_2, q_2_weight, sent, from_, to, dim, is_here, eps, HEAD_DIM, SECOND_NORM)
        elif part == 1:
            _move(k_2, k_2_weight, sent, from_, to, dim, is_here, eps, HEAD_DIM, SECOND_NORM)
        else:
            _move(v_2, q_2_weight, sent, from_, to, dim, is_here, eps, HEAD_DIM, False)


@triton.jit
def part_kernel(
    x,
    one,
    two,
    row_stride,
    token_stride,
    rows,
    length,
    first_tokens,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BASE: tl.constexpr,
    MORE: tl.constexpr,
    IN_PARTS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    token, row = place // rows, place % rows
    head, dim = tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, DIM_BLOCK)[None, :]
    is_here = (head < HEADS) & (dim < HEAD_DIM)
    inside = head * HEAD_DIM + dim
    if IN_PARTS:
        first, count = _first_and_count(head, BASE, MORE)
        of_part = first.to(tl.int64) * length * rows * HEAD_DIM
        from_ = of_part + (place * count + head - first) * HEAD_DIM + dim
    else:
        from_ = row * row_stride + token * token_stride + inside
    values = tl.load(x + from_, mask=is_here)
    if token < first_tokens:
        tl.store(one + (row * first_tokens + token) * (HEADS * HEAD_DIM) + inside, values, mask=is_here)
    else:
        place_2 = row * (length - first_tokens) + token - first_tokens
        tl.store(two + place_2 * (HEADS * HEAD_DIM) + inside, values, mask=is_here)


@triton.jit
def merge_kernel(
    out,
    lse,
    block_out,
    block_lse,
    merged,
    merged_lse,
    out_row,
    out_token,
    out_head,
    lse_row,
    lse_token,
    lse_head,
    block_row,
    block_token,
    block_head,
    block_lse_row,
    block_lse_token,
    block_lse_head,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row, token = place // length, place % length
    head, dim = tl.arange(0, HEADS_BLOCK), tl.arange(0, DIM_BLOCK)[None, :]
    is_head = head < HEADS
    is_here = is_head[:, None] & (dim < HEAD_DIM)
    before = tl.load(lse + row * lse_row + token * lse_token + head * lse_head, mask=is_head, other=0.0)
    now = tl.load(
        block_lse + row * block_lse_row + token * block_lse_token + head * block_lse_head, mask=is_head, other=0.0
    )
    weight = tl.sigmoid(now - before)[:, None]
    of_out = row * out_row + token * out_token + head[:, None] * out_head + dim
    of_block = row * block_row + token * block_token + head[:, None] * block_head + dim
    one = tl.load(out + of_out, mask=is_here, other=0.0)
    two = tl.load(block_out + of_block, mask=is_here, other=0.0).to(tl.float32)
    at = (place * HEADS + head[:, None]) * HEAD_DIM + dim
    tl.store(merged + at, one + weight * (two - one), mask=is_here)
    most, least = tl.maximum(before, now), tl.minimum(before, now)
    tl.store(merged_lse + place * HEADS + head, most + tl.log(1.0 + tl.exp(least - most)), mask=is_head)
