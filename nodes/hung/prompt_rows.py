"""The rows that an attention to prompts is computed for, as a patch in its place is given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .patches import Call


@dataclass(frozen=True)
class PromptRow:
    """One row.

    Args:
        entry: which of the layout's prompts it is evaluated for, and `branch` what that one is: 1 uncond, all others cond.
        latent: its number in the batch.
        prompt: which of several that the row attends to, 0 its own; None where regional prompts give it no others.
    """

    entry: int
    branch: int
    latent: int
    prompt: int | None = None


def plain_rows(call: Call) -> Sequence[PromptRow]:
    """One for each latent of each prompt."""
    latents = call.shape[0] // len(call.layout)
    return [PromptRow(entry, branch, i) for entry, branch in enumerate(call.layout) for i in range(latents)]
