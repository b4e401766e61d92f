"""Which row of a batch a function joins to each: it is asked with rows that say which they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import RowName
from .patches import Call
from .refusal import ELSEWHERE


def marked(rows: int, dims: int) -> Tensor:
    """(rows, 1, ..., 1, 2) of so many dims: of each row its number, from 1, and a one."""
    numbers = torch.arange(1.0, rows + 1, dtype=torch.float64)
    return torch.stack([numbers, torch.ones_like(numbers)], dim=1).view(rows, *[1] * (dims - 2), 2)


def joined(out: Tensor, marks: Tensor) -> list[tuple[int, float]] | None:
    """Of what came of `marked` rows, by row: which one was joined behind it, times what; None where it is something else."""
    if out.shape != (*marks.shape[:-2], 2, 2) or not torch.equal(out[..., :1, :], marks):
        return None
    found = [(float(number), float(weight)) for number, weight in out[..., 1, :].flatten(1).tolist()]
    # Times nothing, it is any row.
    return [(round(number / weight) - 1 if weight else 0, weight) for number, weight in found]


def names_of(call: Call, what: str) -> list[RowName]:
    """Of an evaluation's rows, in ComfyUI's order. Raises: UnsupportedError: several entries of one prompt are evaluated at once."""
    layout = call.layout
    if len(set(layout)) < len(layout):
        raise UnsupportedError(f"A parallel MODEL can't honour {what} beside prompts of several entries.", ELSEWHERE)
    latents = call.shape[0] // len(layout)
    return [(branch, latent) for branch in layout for latent in range(latents)]


def named(numbers: Sequence[int], names: Sequence[RowName]) -> list[RowName]:
    return [names[number] for number in numbers]
