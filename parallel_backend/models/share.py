"""What one rank computes of a job's evaluations: its branches of cfg, its rows of dp, call by call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distributed.cfg import gather_branches, own_branches
from ..distributed.collectives import split_range
from ..distributed.data import gather_batch, shard_batch
from ..distributed.mesh import Mesh
from .extra import Extra, Row
from .network import Network
from .prepared import PreparedPrompt
from .rows import Branch, Prompt
from .spread import UNKNOWN, Spread
from .steps_ahead import AHEAD_BYTES, PromptAtSteps


@dataclass(frozen=True)
class Call:
    """One call of the model: its prompt, and what the model and each ControlNet on it have made of that.

    Nothing is made of a prompt of no rows. `which` rows these are of a job's evaluation, the extras that may act on them, and how
    all of it are `spread`.
    """

    prompt: Prompt
    own: PreparedPrompt
    controls: tuple[PreparedPrompt, ...]
    which: tuple[Row, ...] = ()
    extras: tuple[Extra, ...] = ()
    spread: Spread = UNKNOWN

    @property
    def is_empty(self) -> bool:
        """Of no rows."""
        return self.own.context.shape[0] == 0

    def nbytes(self) -> int:
        """Of what was made."""
        return sum(prepared.nbytes() for prepared in (self.own, *self.controls))


@dataclass(frozen=True)
class Share:
    """What of a job's evaluations with guidance this rank computes: its branches of cfg, its rows of dp.

    Args:
        rows: of the whole latent.
        branches: of guidance, on all ranks.
        calls: of each evaluation. Where all prompts have equal length, this rank's are one call, for as many times the rows.
        stacked: how many branches a call is of.
        steps: of each call, the model's prompt at the steps of the job, and its ControlNets'.
    """

    mesh: Mesh
    rows: int
    branches: int
    calls: list[Call]
    stacked: int
    steps: list[list[PromptAtSteps]]

    @classmethod
    def of(
        cls,
        network: Network,
        mesh: Mesh,
        rows: int,
        branches: Sequence[Branch],
        prepare: Callable[[Prompt], Call],
    ) -> Share:
        """Of `rows` latents, each with these branches (cond, uncond and others)."""
        own = own_branches(branches, mesh.cfg)
        # By all branches, not by its own: ranks that gather slices of weights together make as many calls.
        stacked = len(own) if all(branch.is_like(branches[0]) for branch in branches) else 1
        latents = range(*split_range(rows, mesh.dp.degree, mesh.dp.rank))
        every = tuple((branch.number, i) for branch in branches for i in latents)
        over_cfg = Spread(every, ((mesh.cfg, (len(latents),) * len(branches)),))
        is_spread = len(own) < len(branches) == 2  # beyond two, nothing mixes their rows
        calls = []
        for first in range(0, len(own), stacked):
            together = own[first : first + stacked]
            call = prepare(Prompt.stacked([branch.prompt.share(mesh.dp) for branch in together]))
            which = tuple((branch.number, i) for branch in together for i in latents)
            spread = over_cfg if is_spread else Spread(which)
            calls.append(replace(call, which=which, extras=together[0].extras, spread=spread))
        most = AHEAD_BYTES // sum(1 + len(call.controls) for call in calls)
        steps = [
            [
                PromptAtSteps(network, call.own, most),
                *(
                    PromptAtSteps(use.network, p, most)
                    for use, p in zip(call.prompt.controls, call.controls, strict=True)
                ),
            ]
            for call in calls
        ]
        return cls(mesh, rows, len(branches), calls, stacked, steps)

    def foresee(self, timesteps: Sequence[Tensor]) -> None:
        """Those of the schedule, on the CPU, in their order."""
        for at_steps in self.steps:
            for prompt in at_steps:
                prompt.foresee([float(timestep) for timestep in timesteps])

    def at(self, timestep: Tensor, sigma: float | None) -> list[Call]:
        """The calls of an evaluation, with what networks take from its timestep, which is on the CPU.

        Comm: the networks', where that wasn't made ahead.
        """
        return [
            call if call.is_empty else self._at(call, at_steps, float(timestep), sigma)
            for call, at_steps in zip(self.calls, self.steps, strict=True)
        ]

    @staticmethod
    def _at(call: Call, at_steps: Sequence[PromptAtSteps], timestep: float, sigma: float | None) -> Call:
        own, *controls = at_steps
        of_controls = zip(call.prompt.controls, controls, call.controls, strict=True)
        added = tuple(at.at(timestep) if use.is_at(sigma) else prepared for use, at, prepared in of_controls)
        return replace(call, own=own.at(timestep), controls=added)

    def nbytes(self) -> int:
        """Of what was made of prompts and timesteps."""
        steps = sum(prompt.nbytes() for at_steps in self.steps for prompt in at_steps)
        return steps + sum(call.nbytes() for call in self.calls)

    def own_rows(self, x: Tensor) -> Tensor:
        """The rows of `x` that each call takes."""
        own = shard_batch(x, self.mesh.dp)
        return torch.cat([own] * self.stacked) if self.stacked > 1 else own

    def gather(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The output of every branch, all rows, on every rank, from those of this rank's calls.

        Comm: one all-gather of the output over cfg and one over dp.
        """
        own = [out for outputs_of_call in outputs for out in outputs_of_call.chunk(self.stacked)]
        branches = gather_branches(own, self.branches, self.mesh.cfg)
        return [gather_batch(out, self.rows, self.mesh.dp) for out in branches]
