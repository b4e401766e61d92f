"""What a network computes of prompt and timestep alone, made for many steps of a job at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .prepared import PreparedPrompt

# Of steps that are made ahead, in a job: SD3.5-Large's take 2.2 MB a row and step in half precision. Making them takes as much again.
AHEAD_BYTES = 64 * 2**20


class Timed(Protocol):
    """A network that takes something from the timestep."""

    def at_steps(
        self, prepared: PreparedPrompt, timesteps: Sequence[float], most_bytes: int, /
    ) -> list[PreparedPrompt]:
        """The prompt with what evaluations at these timesteps take, from the first on, as many as fit; at least of one."""
        ...


class PromptAtSteps:
    """A prepared prompt at the timesteps of a job. All ranks ask for the same ones, in the same order.

    Args:
        most_bytes: of what is made ahead.
    """

    def __init__(self, network: Timed, prepared: PreparedPrompt, most_bytes: int) -> None:
        self._network, self._prepared, self._most_bytes = network, prepared, most_bytes
        self._foreseen: list[float] = []
        self._made: dict[float, PreparedPrompt] = {}
        self._between: dict[float, PreparedPrompt] = {}

    def foresee(self, timesteps: Sequence[float]) -> None:
        """These come, in this order, perhaps with others in between."""
        self._foreseen = list(dict.fromkeys(timesteps))

    def at(self, timestep: float) -> PreparedPrompt:
        """The prompt with what an evaluation at that timestep takes; others are made along, where they were foreseen.

        Comm: the network's, where it is made now.
        """
        for made in (self._made, self._between):
            if timestep in made:
                return made[timestep]
        if timestep not in self._foreseen:
            self._between = self._from([timestep])  # the last alone: of second-order and adaptive samplers
            return self._between[timestep]
        self._made.clear()
        self._made = self._from(self._foreseen[self._foreseen.index(timestep) :])
        return self._made[timestep]

    def _from(self, timesteps: Sequence[float]) -> dict[float, PreparedPrompt]:
        made = self._network.at_steps(self._prepared, timesteps, self._most_bytes)
        return dict(zip(timesteps, made, strict=False))

    def nbytes(self) -> int:
        """Of what is kept of steps now."""
        made = [*self._made.values(), *self._between.values()]
        return sum(prepared.nbytes() - self._prepared.nbytes() for prepared in made)


def vectors_at(prepared: PreparedPrompt, timesteps_B: Tensor, vectors: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B, width): those that `with_vectors` has laid beside the prompt, or made now. Comm: `vectors`', where made now."""
    made = prepared.tensors.get("vectors")
    return vectors(timesteps_B, prepared.tensors["pooled"]) if made is None else made


def with_vectors(
    prepared: PreparedPrompt,
    timesteps: Sequence[float],
    most_bytes: int,
    width: int,
    vectors: Callable[[Tensor, Tensor], Tensor],
) -> list[PreparedPrompt]:
    """As `Timed.at_steps`, of a network whose prompts have `pooled`, (B, D): each gets `vectors`, (B, width).

    Args:
        vectors: (timesteps (N,) in fp32, pooled (N, D)) -> (N, width).
    """
    pooled_BD = prepared.tensors["pooled"]
    rows = pooled_BD.shape[0]
    now = timesteps[: max(1, most_bytes // (rows * width * pooled_BD.element_size()))]
    # A GPU gets numbers with the kernels that write them: nothing is copied, and nobody waits.
    times = torch.cat([torch.full((rows,), time, dtype=torch.float32, device=pooled_BD.device) for time in now])
    made = vectors(times, pooled_BD.repeat(len(now), 1)).split(rows)
    return [replace(prepared, tensors={**prepared.tensors, "vectors": own}) for own in made]
