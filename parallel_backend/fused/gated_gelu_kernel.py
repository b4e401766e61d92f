"""Triton's kernel of gated_gelu.py; arithmetic is in fp32."""

# Triton's language has no types that mypy knows.
# mypy: ignore-errors

import triton
import triton.language as tl

cdiv = triton.cdiv


@triton.jit
def gated_gelu_kernel(x, out, D, BLOCK: tl.constexpr):
    """A piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < D
    value = tl.load(x + row * 2 * D + at, mask=mask).to(tl.float32)
    gate = tl.load(x + row * 2 * D + D + at, mask=mask).to(tl.float32)
    gate = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    tl.store(out + row * D + at, (value * gate).to(out.dtype.element_ty), mask=mask)
