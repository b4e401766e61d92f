"""What an evaluation is of: prompts, rows of latents, branches of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from ..distributed.collectives import split_range
from ..distributed.data import shard_batch
from ..distributed.mesh import MeshAxis
from .control_use import ControlUse
from .extra import Extra, Row
from .residuals import NONE, Residuals
from .spread import UNKNOWN, Spread


@dataclass(frozen=True)
class Prompt:
    """Text tokens (B, L, E) and pooled prompt (B, A), in the model's dtype and on its device, and the ControlNets on it.

    `concat`: (B, extra channels, Y, X), which the model takes beside the latent's own, where its input doesn't have them already.
    """

    context: Tensor
    pooled: Tensor
    concat: Tensor | None = None
    controls: tuple[ControlUse, ...] = ()

    def share(self, axis: MeshAxis) -> Prompt:
        """That of this rank's rows."""
        rows = self.context.shape[0]
        controls = tuple(use.share(axis, rows) for use in self.controls)
        concat = None if self.concat is None else shard_batch(self.concat, axis)
        return Prompt(shard_batch(self.context, axis), shard_batch(self.pooled, axis), concat, controls)

    def is_like(self, other: Prompt) -> bool:
        """Whether one call of the model can be of both."""
        same = [a is b for a, b in zip(self.controls, other.controls, strict=False)]
        return self.context.shape == other.context.shape and len(self.controls) == len(other.controls) and all(same)

    @classmethod
    def stacked(cls, prompts: Sequence[Prompt]) -> Prompt:
        """All of them, which are alike, one after the other, for as many times the rows."""
        if len(prompts) == 1:
            return prompts[0]
        context, pooled = torch.cat([p.context for p in prompts]), torch.cat([p.pooled for p in prompts])
        concats = [prompt.concat for prompt in prompts if prompt.concat is not None]
        controls = tuple(use.times(len(prompts)) for use in prompts[0].controls)
        return cls(context, pooled, torch.cat(concats) if concats else None, controls)


@dataclass(frozen=True)
class Branch:
    """An evaluation that guidance asks for.

    Args:
        number: which prompt its rows are of, for extras that differ by row: 0 cond, 1 uncond, others as they come.
        extras: which may act in it.
    """

    prompt: Prompt
    number: int = 0
    extras: tuple[Extra, ...] = ()

    def is_like(self, other: Branch) -> bool:
        """Whether one call of the model can be of both."""
        same = len(self.extras) == len(other.extras) and all(map(is_, self.extras, other.extras))
        return same and self.prompt.is_like(other.prompt)


@dataclass(frozen=True)
class Rows:
    """Latents (B, C, Y, X) with their timesteps (B,) and prompt, on every rank.

    Args:
        residuals: whole, for all rows or one for each of them, anywhere and in any dtype.
        extras: which may act; `which` rows these are, for those that differ by row, and among which others they are `spread`.
    """

    x: Tensor
    timesteps: Tensor
    prompt: Prompt
    residuals: Residuals = NONE
    extras: Sequence[Extra] = ()
    which: tuple[Row, ...] = ()
    spread: Spread = UNKNOWN

    def share(self, axis: MeshAxis) -> Rows:
        """Those of this rank of the axis."""
        rows = self.x.shape[0]

        def own(tensor: Tensor) -> Tensor:
            return shard_batch(tensor, axis) if tensor.shape[0] == rows else tensor

        x, times = shard_batch(self.x, axis), shard_batch(self.timesteps, axis)
        first, last = split_range(rows, axis.degree, axis.rank)
        residuals, which = self.residuals.each(own), self.which[first:last]
        return Rows(x, times, self.prompt.share(axis), residuals, self.extras, which)
