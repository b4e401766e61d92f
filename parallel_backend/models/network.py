"""What a family's network looks like to those who ask it, whatever it is made of."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..distributed.stale import Kept, Step
from ..errors import UnsupportedError


class Network(Protocol):
    """A model with its weights, in its mesh."""

    @property
    def config(self) -> Any: ...
    def check_size(self, height: int, width: int, text_tokens: int) -> None: ...
    def new_job(self, displaced: bool) -> Kept: ...
    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, step: Step, /) -> Tensor: ...


class Positions(Protocol):
    """What a transformer is told of the places of this rank's image tokens."""

    def rows(self, model: Any, height: int, width: int) -> Tensor: ...


class TokenNetwork:
    """A transformer, bound to its positions. Every evaluation is exact."""

    def __init__(self, model: Any, positions: Positions) -> None:
        self.model, self.positions, self.config = model, positions, model.config

    def check_size(self, height: int, width: int, text_tokens: int) -> None:
        """Raises: InputError: a latent that this model can't take."""
        self.model.tokens_for(height, width, text_tokens)

    def new_job(self, displaced: bool) -> Kept:
        """Raises: UnsupportedError: displaced steps are asked for."""
        if displaced:
            raise UnsupportedError(
                f"{self.config.family} has no displaced steps in this version; UNets have.", "Leave displaced off."
            )
        return Kept()

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, step: Step) -> Tensor:
        places = self.positions.rows(self.model, x.shape[2], x.shape[3])
        return self.model(x, timesteps, context, pooled, places)
