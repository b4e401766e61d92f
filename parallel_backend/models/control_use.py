"""A ControlNet on a prompt, computed by the ranks themselves in the split of the model that it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from ..distributed.data import shard_batch
from ..distributed.mesh import MeshAxis
from ..distributed.stale import Step
from .prepared import PreparedPrompt
from .residuals import NONE, Residuals


class ControlNetwork(Protocol):
    """A ControlNet with its weights, in the mesh of its model."""

    def prepare(self, hint: Tensor, /) -> Tensor:
        """What a job keeps of a hint: the same in all its evaluations, on every rank. Raises: InputError: one that it can't take."""
        ...

    def prepare_prompt(self, context: Tensor, pooled: Tensor, /) -> PreparedPrompt:
        """What its evaluations take from a prompt alone, as its model is given it."""
        ...

    def at_steps(
        self, prepared: PreparedPrompt, timesteps: Sequence[float], most_bytes: int, /
    ) -> list[PreparedPrompt]:
        """As `Timed` says."""
        ...

    def check(self, prepared: Tensor, control_types: Sequence[int], shape: Sequence[int], /) -> None:
        """Raises: InputError: latents of that shape can't be computed with it."""
        ...

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        prompt: PreparedPrompt,
        prepared: Tensor,
        step: Step,
        control_types: Sequence[int],
        /,
    ) -> Residuals:
        """This rank's part of what it adds to the model's activations at `x`, which is whole; in a shallow step of what is used."""
        ...


@dataclass(frozen=True)
class ControlUse:
    """Where a ControlNet is added, and how strongly.

    Args:
        hint: as the network has prepared it, of one row or of as many as there are latents.
        start, end: sigmas; it is added from the first on, which is the greater one, to the second, both included.
        types: of a union's, what its hint is.
        number: among the uses of its job, whose stale tensors it keeps apart.
    """

    network: ControlNetwork
    hint: Tensor
    strength: float = 1.0
    start: float = inf
    end: float = 0.0
    types: Sequence[int] = ()
    number: int = 0

    def share(self, axis: MeshAxis, rows: int) -> ControlUse:
        """That of this rank's of so many rows."""
        return replace(self, hint=shard_batch(self.hint, axis)) if self.hint.shape[0] == rows else self

    def times(self, prompts: int) -> ControlUse:
        """Of rows that are computed for so many prompts at once."""
        return self if self.hint.shape[0] == 1 else replace(self, hint=torch.cat([self.hint] * prompts))

    def is_at(self, sigma: float | None) -> bool:
        """Whether it is added there."""
        return sigma is None or self.end <= sigma <= self.start

    def residuals(self, x: Tensor, timesteps: Tensor, prompt: PreparedPrompt, step: Step) -> Residuals:
        """This rank's, times the strength; none outside the range.

        The first evaluation of a use is exact: there is nothing yet that could be stale.
        Comm: as the network says.
        """
        if not self.is_at(step.sigma):
            return NONE
        place, phase = (step.branch, self.number), step.phase
        if step.kept is not None:
            phase = phase if place in step.kept.begun else "sync"
            step.kept.begun.add(place)
        is_shallow = step.cache is not None and step.cache.is_foreseen
        own = replace(step, branch=place, phase=phase, is_shallow=is_shallow)
        added = self.network(x, timesteps, prompt, self.hint, own, self.types)
        if own.stale is not None:
            own.stale.end_evaluation()
        return added if self.strength == 1.0 else added.each(lambda tensor: tensor * self.strength)
