"""Each attention kernel by itself, at the model's sizes: its time, and how far it is from fp64.

Shapes: B rows, L tokens, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallel_backend.bench.device_time import timed
from parallel_backend.distributed.kernel_trial import choose_kernel
from parallel_backend.distributed.kernels import KERNELS, Use, attend, resolve_kernel
from parallel_backend.errors import ConfigError
from parallel_backend.models.mmdit import HEAD_DIM

from .report import Report, Value
from .sizes import Sizes, dtype_name
from .weights import relative_error

NAMES = ("native", "flash", "flash3", "cudnn", "efficient")
# Of what the reference computes in fp64: a row, and so many heads.
HEADS = 2


def attention_kernels(report: Report, sizes: Sizes, device: torch.device) -> None:
    """A row for each kernel, plain and as ring needs it; one that can't run here is named with the reason."""
    shape = (2, sizes.tokens, sizes.mmdit.heads, HEAD_DIM)
    report.table(
        f"Attention alone, {list(shape)} (B, L, N, H)",
        *("dtype", "kernel", "ms", "TFLOP/s", "error against fp64", "error of the log-sum-exp"),
    )
    for dtype in sizes.dtypes:
        trial = Trial.of(shape, device, dtype, sizes)
        for name in NAMES:
            report.row(dtype_name(dtype), name, *tried(partial(trial.figures, name, ring=False)))
            figures = tried(partial(trial.figures, name, ring=True))
            report.row(dtype_name(dtype), f"{name}, with log-sum-exp", *figures)
        chosen = [tried(partial(_auto, trial.use(ring)))[0] for ring in (False, True)]
        report.note(f"auto takes {chosen[0]} in {dtype_name(dtype)}, and {chosen[1]} with ring")


def tried(measure: Callable[[], list[Value]]) -> list[Value]:
    """The figures, or why there are none."""
    try:
        return measure()
    except ConfigError as error:
        return [error.message]
    except Exception as error:  # noqa: BLE001 - a kernel that fails on this card is a result
        return [f"fails: {type(error).__name__}: {str(error).splitlines()[0][:150]}"]


@dataclass(frozen=True)
class Trial:
    """Queries, keys and values, and what they give in fp64: of the first row and heads, output and log-sum-exp."""

    q: Tensor
    k: Tensor
    v: Tensor
    expected: Tensor
    expected_lse: Tensor
    sizes: Sizes

    @classmethod
    def of(cls, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Trial:
        qkv = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
        return cls(*qkv, *reference(*map(_part, qkv)), sizes)

    def use(self, ring: bool) -> Use:
        return Use(self.q.device, self.q.dtype, ring, *self.q.shape[2:])

    def figures(self, name: str, ring: bool) -> list[Value]:
        """Raises: ConfigError: the kernel isn't here."""
        q, k, v = self.q, self.k, self.v
        resolve_kernel(name, self.use(ring))
        with_lse = KERNELS[name].lse if ring else None

        def call() -> tuple[Tensor, Tensor | None]:
            return with_lse(q, k, v) if with_lse is not None else (attend(name, q, k, v), None)

        out, lse = call()
        spent = timed(call, q.device, self.sizes.warm_up, 2 * self.sizes.repeats).whole
        rows, tokens, heads, width = q.shape
        rate = 4 * rows * heads * tokens**2 * width / spent / 1e9
        error = relative_error(_part(out), self.expected)
        return [spent, rate, error, None if lse is None else relative_error(_part(lse), self.expected_lse)]


def _auto(use: Use) -> list[Value]:
    return [choose_kernel("auto", use)[0]]


def _part(x_BLN: Tensor) -> Tensor:
    return x_BLN[:1, :, :HEADS]


def reference(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, L, N, H) and its log-sum-exp (B, L, N), in fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)
