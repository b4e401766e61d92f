"""What extras of a sampling send to the ranks, for the node's text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ...parallel_backend.rpc.extras import AnyExtra


@dataclass
class ExtraCost:
    """`sizes`: bytes of the tensors that are kept, each once."""

    sizes: dict[int, int] = field(default_factory=dict)

    def note(self, extras: Iterable[AnyExtra]) -> ExtraCost:
        """Once more, of an evaluation or of a whole sampling."""
        for extra in extras:
            extra.each(self._kept, fresh=lambda tensor: tensor)
        return self

    def _kept(self, tensor: Tensor) -> Tensor:
        self.sizes[id(tensor)] = tensor.nbytes
        return tensor

    def __str__(self) -> str:
        """Empty where nothing was sent."""
        mib = sum(self.sizes.values()) / 2**20
        return f"image prompts and other tensors inside the model: {mib:.1f} MiB, sent once" if self.sizes else ""
