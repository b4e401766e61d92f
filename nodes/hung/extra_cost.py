"""What extras of a sampling send to the ranks, for the node's text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ...parallel_backend.rpc.extras import AnyExtra


@dataclass
class ExtraCost:
    """`kept`: tensors that are sent once; `fresh`: bytes of those that are others at each of `evaluations`."""

    kept: dict[int, Tensor] = field(default_factory=dict)
    fresh: int = 0
    evaluations: int = 0

    def note(self, extras: Iterable[AnyExtra], evaluations: int = 1) -> ExtraCost:
        """Once more, of so many evaluations at once."""
        before = self.fresh
        for extra in extras:
            extra.each(self._keep, fresh=self._count)
        self.evaluations += evaluations if self.fresh > before else 0
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        self.kept[id(tensor)] = tensor
        return tensor

    def _count(self, tensor: Tensor) -> Tensor:
        self.fresh += tensor.nbytes
        return tensor

    def __str__(self) -> str:
        """Empty where nothing was sent."""
        told = []
        if self.kept:
            told.append(f"{sum(tensor.nbytes for tensor in self.kept.values()) / 2**20:.1f} MiB, sent once")
        if self.evaluations:
            told.append(f"{self.fresh / self.evaluations / 2**20:.1f} MiB an evaluation")
        return f"image prompts and other tensors inside the model: {'; '.join(told)}" if told else ""
