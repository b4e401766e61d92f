"""The tensors that travel with a request, and where its body finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor

from ..rpc.conditioning import Conditioning
from ..rpc.extras import AnyExtra
from ..rpc.messages import Control, Prompt, TensorIndex
from .remote_control import ControlUse
from .sent_tensors import Attachment

SIDES = ("input", "middle", "output")
Residuals: TypeAlias = Mapping[str, Sequence[Tensor | None]]


class RequestTensors:
    """Each is taken along and told its place.

    Args:
        dtype: the model's, in which what belongs to ControlNets and extras travels; whole numbers stay what they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.attachments: list[Attachment] = []
        self._dtype = dtype
        self._places: dict[tuple[int, bool], TensorIndex] = {}

    def place(self, tensor: Tensor, *, kept: bool = False, shared: bool = False, lasting: bool = False) -> TensorIndex:
        self.attachments.append(Attachment(tensor, kept, shared, lasting))
        return len(self.attachments) - 1

    def in_fp32(self, tensor: Tensor | None) -> TensorIndex | None:
        return None if tensor is None else self.place(tensor.float())

    def prompt(self, conditioning: Conditioning, controls: Sequence[ControlUse]) -> Prompt:
        named = conditioning.prompt(partial(self.place, kept=True))
        return msgspec.structs.replace(named, controls=[use.named(self.hint) for use in controls])

    def hint(self, tensor: Tensor) -> TensorIndex:
        return self._once(tensor, kept=True)

    def residuals(self, given: Residuals) -> Control:
        inputs, middle, outputs = (
            [None if x is None else self._once(x, kept=False) for x in given.get(side, ())] for side in SIDES
        )
        return Control(inputs, middle[0] if middle else None, outputs)

    def extras(self, given: Sequence[AnyExtra]) -> list[AnyExtra]:
        """As a request names them: what comes again is kept."""
        keep, once = partial(self._once, kept=True, lasting=True), partial(self._once, kept=False)
        return [extra.each(keep, once) for extra in given]

    def _once(self, tensor: Tensor, *, kept: bool, lasting: bool = False) -> TensorIndex:
        """One that stands in several places travels once."""
        key = (id(tensor), kept)
        if key not in self._places:
            self._places[key] = self.place(self._as_told(tensor), kept=kept, shared=not kept, lasting=lasting)
        return self._places[key]

    def _as_told(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor
