"""What an evaluation reads beside weights and what its job keeps: tensors, and nothing that changes without them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .extra import Extra
from .prepared import PreparedPrompt
from .residuals import NONE, Residuals


@dataclass(frozen=True)
class Inputs:
    """What a network makes of a call before it evaluates it. A graph of the evaluation holds for all inputs with the same `form`.

    Args:
        changing: beside the latent `x`, what is another tensor at each step, by names of the network's own.
        lasting: what comes again, as the same tensor with the same values, at every step of a job.
        prepared: lasts as well.
        extras: those that act; their tensors last too.
    """

    x: Tensor
    changing: Mapping[str, Tensor]
    prepared: PreparedPrompt
    lasting: Mapping[str, Tensor]
    residuals: Residuals = NONE
    extras: Sequence[Extra] = ()

    def fresh(self) -> list[Tensor]:
        """Those that no evaluation has seen, in a fixed order; a residual that stands in several places once."""
        distinct = {id(tensor): tensor for tensor in self.residuals.tensors()}
        return [self.x, *self.changing.values(), *distinct.values()]

    def kept(self) -> list[Tensor]:
        """Those that last, in a fixed order."""
        prepared = self.prepared
        of_extras = (tensor for extra in self.extras for tensor in extra.tensors())
        return [*self.lasting.values(), prepared.context, prepared.pooled, *prepared.tensors.values(), *of_extras]

    def form(self) -> Hashable:
        """Names, places, shapes, strides and dtypes."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(map(id, self.residuals.tensors())))}
        given = self.residuals
        places = [
            tuple(None if tensor is None else numbers[id(tensor)] for tensor in side)
            for side in (given.input, (given.middle,), given.output)
        ]
        names = (*self.changing, *self.lasting, *self.prepared.tensors)
        tensors = tuple((t.shape, t.stride(), t.dtype) for t in (*self.fresh(), *self.kept()))
        return names, *places, tensors, tuple(extra.form() for extra in self.extras)

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """`change` done to every tensor."""

        def changed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        old = self.prepared
        prepared = PreparedPrompt(change(old.context), change(old.pooled), changed(old.tensors))
        return replace(
            self,
            x=change(self.x),
            changing=changed(self.changing),
            prepared=prepared,
            lasting=changed(self.lasting),
            residuals=self.residuals.each(change),
            extras=[extra.each(change) for extra in self.extras],
        )
