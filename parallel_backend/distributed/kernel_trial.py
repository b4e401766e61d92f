"""The attention kernel is tried before a model is loaded: what imports may still not run on a card, or be wrong there.

Shapes: B batch, L tokens, N heads, H head dim.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from ..errors import ConfigError, in_a_line
from .device_faults import breaks_rank
from .kernels import HALF, KERNELS, Use, attend, resolve_kernel

log = logging.getLogger("parallel_backend")

_TOKENS = 130  # more than a block of any kernel, and no multiple of one
_ROWS = 2


def choose_kernel(name: str, use: Use) -> tuple[str, str]:
    """The first kernel of those that `name` stands for that is right here, and what the user should know of the others.

    Raises: ConfigError: the one that is named can't run here, or gives something else than attention.
    """
    candidates = resolve_kernel(name, use)
    faults: list[str] = []
    for kernel in candidates:
        fault = tried(kernel, use)
        if fault is None:
            note = f"on {_card(use)} attention kernel {kernel!r} computes, for {'; '.join(faults)}" if faults else ""
            log.log(logging.WARNING if note else logging.INFO, "%s", note or f"attention kernel {kernel!r}")
            return kernel, note
        faults.append(f"{kernel!r} {fault}")
    if name == "auto":
        raise ConfigError(
            f"No attention kernel works on {_card(use)}.", "Install a torch built for this card.", "\n".join(faults)
        )
    works = choose_kernel("auto", use)[0]
    raise ConfigError(
        f"Attention kernel {faults[0]} on {_card(use)}.",
        f"Use 'auto' or {works!r}, which works, or install another build.",
    )


def tried(kernel: str, use: Use) -> str | None:
    """What is wrong with one attention of this kernel, compared with a plain one in fp32; None where it is right.

    Raises: OutOfMemoryError: torch's, which says nothing about the kernel.
    """
    generator = torch.Generator().manual_seed(0)
    # As a model has them: side by side, tokens outside, rows inside.
    joint = torch.randn(_TOKENS, _ROWS, 3, use.heads, use.head_dim, generator=generator).to(use.dtype)
    plain_out, plain_lse = _plain(*joint.float().permute(2, 1, 0, 3, 4))
    q, k, v = joint.to(use.device).permute(2, 1, 0, 3, 4)
    with_lse = KERNELS[kernel].lse if use.ring else None
    try:
        results = [(attend(kernel, q, k, v), plain_out)]
        if with_lse is not None:
            out, lse = with_lse(q, k, v)
            results += [(out, plain_out), (lse, plain_lse)]
        results = [(found.cpu().float(), wanted) for found, wanted in results]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if breaks_rank(error):  # after it every kernel fails here
            raise
        return f"failed ({in_a_line(error)})"
    for found, wanted in results:
        if found.shape != wanted.shape:
            return f"gave a tensor of shape {list(found.shape)} in place of {list(wanted.shape)}"
        worst = float((found - wanted).abs().max())
        if not worst <= _tolerance(kernel, use.dtype):
            return "gave NaN" if math.isnan(worst) else f"gave wrong numbers (off by {worst:.2g})"
    return None


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, L, N, H) and its log-sum-exp (B, L, N), as they are written down."""
    scores = torch.einsum("blnh,bmnh->blnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("blnm,bmnh->blnh", scores.softmax(-1), v), scores.logsumexp(-1)


def _tolerance(kernel: str, dtype: torch.dtype) -> float:
    """Values are about 1 or less; a kernel that is wrong is off by as much."""
    if dtype not in HALF:
        return 1e-4
    return 5e-2 if KERNELS[kernel].coarse else 1e-2


def _card(use: Use) -> str:
    return torch.cuda.get_device_name(use.device) if use.device.type == "cuda" else "this CPU"
