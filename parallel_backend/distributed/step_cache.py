"""Step caches: what an evaluation shares with an earlier one is taken from there, and only the rest is computed.

Sources: first-block cache (ParaAttention, chengzeyi 2024); TeaCache (Liu et al. 2024, arXiv 2411.19108), equation 5, without its
polynomial, which is fitted to one model; DeepCache (Ma et al. 2023, arXiv 2312.00858), section 3.3.
Shapes: B rows, L this rank's tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import inf

import torch
from torch import Tensor

from ..config import StepCache
from .collectives import all_gather
from .mesh import MeshAxis


class StepCaches:
    """Those of a job, one for each branch.

    Args:
        asked: by the user.
        ranks: all of the mesh, which decide alike.
        parts: by this rank's branches, which part of the decision theirs is, of `count`. What one process would evaluate in one call
            is one part, whichever ranks have its rows.
    """

    def __init__(self, asked: StepCache, ranks: MeshAxis, parts: Sequence[int], count: int) -> None:
        self.asked, self.ranks, self.count = asked, ranks, count
        self.branches = [BranchCache(self, part) for part in parts]
        self.steps = 0  # of the job, once its schedule is known
        self.step, self.evaluations = 0, 0
        self._acting: Hashable = None

    def begin(self, step: int, acting: Hashable) -> None:
        """An evaluation of that step starts; where other extras and ControlNets act in it than in the last one, nothing is taken."""
        if acting != self._acting:
            for branch in self.branches:
                branch.forget()
        self.step, self._acting = step, acting
        self.evaluations += 1

    @property
    def may_reuse(self) -> bool:
        """Whether the step is none of the first and last ones that are always computed."""
        return self.asked.first_steps <= self.step < self.steps - self.asked.last_steps

    def reused(self) -> list[int]:
        """The steps of reused evaluations, of one branch after the other."""
        return [step for branch in self.branches for step in branch.reused]

    def note(self) -> str:
        """What the user is told in the end."""
        return f"step cache ({self.asked.method}): {len(self.reused())} of {self.evaluations * len(self.branches)} evaluations reused"

    def nbytes(self) -> int:
        """Of what is kept now."""
        return sum(branch.nbytes() for branch in self.branches)


class BranchCache:
    """That of the evaluations of one branch. Each of them calls `taken` once, on every rank of the mesh.

    Args:
        rest: what the last computed evaluation gave, to be taken again: of a transformer, what its other blocks added to the image
            tokens, (B, L, D), by stage; of a UNet, what its deeper levels gave its upper ones.
        reused: the steps whose evaluations took it.
    """

    def __init__(self, job: StepCaches, part: int) -> None:
        self.job, self.part = job, part
        self.rest: Tensor | None = None
        self.reused: list[int] = []
        # Evaluations since the last computed one.
        self._since: int | None = None
        self._seen: Tensor | None = None
        self._change = 0.0

    @property
    def is_foreseen(self) -> bool:
        """Whether the next call of `taken` is known to give `rest`: DeepCache counts."""
        asked, since = self.job.asked, self._since
        counts = asked.method == "deepcache" and self.job.may_reuse
        return counts and since is not None and since + 1 < asked.interval

    @property
    def blocks_ahead(self) -> int:
        """How many of a transformer's blocks are computed before it is decided."""
        return 1 if self.job.asked.method == "first_block" else 0

    def forget(self) -> None:
        """The next evaluation is computed."""
        self._since = None

    def taken(self, seen: Tensor | None = None) -> Tensor | None:
        """`rest`, where this evaluation takes it; None where it is to be made anew.

        Args:
            seen: this rank's part of what decides, of the same shape each time; None where others have it all.
        Comm: one all-gather of two numbers for each part, on the CPU, where the last evaluation may be reused and its method looks at
            `seen`: the host waits for them.
        """
        reused = self._since is not None and self.job.may_reuse and self._is_like(seen)
        if reused:
            self.reused.append(self.job.step)
        if self.job.asked.method == "teacache" or not reused:
            self._seen = seen
        if not reused:
            self.rest, self._change = None, 0.0
        self._since = self._since + 1 if reused and self._since is not None else 0
        return self.rest

    def _is_like(self, seen: Tensor | None) -> bool:
        """TeaCache adds up changes from evaluation to evaluation; a first-block cache looks at the change since the last computed one."""
        asked = self.job.asked
        if asked.method == "deepcache":
            return self.is_foreseen
        change = self._relative_change(seen)
        if asked.method == "teacache":
            self._change += change
            change = self._change
        return change < asked.threshold

    def _relative_change(self, seen: Tensor | None) -> float:
        """L1, over the whole picture and all rows; infinite where there was nothing."""
        sums = torch.zeros(self.job.count, 2, dtype=torch.float64)
        if seen is not None and self._seen is not None:
            change, before = (seen - self._seen).abs(), self._seen.abs()
            sums[self.part] = torch.stack([change.sum(dtype=torch.float32), before.sum(dtype=torch.float32)]).cpu()
        ranks = self.job.ranks
        # Added in one order on all ranks, so that all have the same number to the last bit.
        change, before = all_gather(sums[None], 0, [1] * ranks.degree, ranks).sum(0)[self.part].tolist()
        return change / before if before > 0 else inf

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.rest, self._seen) if tensor is not None)
