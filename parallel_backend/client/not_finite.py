"""NaN and infinity in what a job was given and in what came back: what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MADE_BY_NODE = "Look at the node that made it."


def is_finite(x: Tensor) -> bool:
    """Whether `x` holds neither NaN nor infinity."""
    # They stay in a sum, which is one pass without a copy; that of finite values overflows beyond 1e38 alone.
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # In numpy: torch would wake its threads, which then spin for a while on the ranks' cores.
        with np.errstate(all="ignore"):
            return bool(np.isfinite(x.detach().numpy().sum()))
    return bool(torch.isfinite(x.sum(dtype=torch.float32)))


@dataclass(frozen=True)
class NotFinite:
    """What was found.

    Args:
        given: what of the inputs held them.
        step, steps: the first step that gave them, from 1, of how many; 0: no step.
        in_result: whether the result, too, holds them.
    """

    given: tuple[str, ...] = ()
    step: int = 0
    steps: int = 0
    in_result: bool = True

    @property
    def message(self) -> str:
        at = f" from step {self.step} of {self.steps} on" if self.step else ""
        if self.given:
            holds = "holds" if len(self.given) == 1 else "hold"
            result = f", and so does the result{at}" if self.in_result else ""
            return f"The {' and the '.join(self.given)} that came in {holds} NaN or infinity{result}."
        return f"The result holds NaN or infinity{at}; what came in had none, so that the model made them."

    @property
    def remedy(self) -> str:
        if self.given:
            return _MADE_BY_NODE
        return (
            "Its weights or what is patched on them hold such values, or its dtype is too narrow: leave LoRAs out, or choose "
            "bfloat16 or float32 in Mesh Config."
        )


def held_by(inputs: Mapping[str, Tensor | None]) -> tuple[str, ...]:
    """Names of the inputs that hold NaN or infinity."""
    return tuple(name for name, x in inputs.items() if x is not None and not is_finite(x))
