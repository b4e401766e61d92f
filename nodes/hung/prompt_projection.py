"""Projections of a UNet's attentions to the prompt, on a network without weights: what nodes that call them are given.

Ranks have the weights, as they are patched when they sample, and make keys and values of the prompt itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from .refusal import ELSEWHERE

# The end of their names in the network.
PROJECTIONS = ("attn2.to_k", "attn2.to_v")


class OfPrompt(Tensor):
    """What a projection would give of a prompt (B, T, E): both by name, and no values.

    It can be moved and kept; a node that computes with it is refused.
    """

    layer: str
    prompt: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is not Tensor.to:
            refuse_layer(next((x.layer for x in args if isinstance(x, OfPrompt)), " or ".join(PROJECTIONS)))
        return args[0]


def of_prompt(layer: str, prompt: Tensor) -> OfPrompt:
    """As a projection's forward."""
    made: OfPrompt = torch.empty(0, device="meta").as_subclass(OfPrompt)
    made.layer, made.prompt = layer, prompt
    return made


def refuse_layer(name: str, *_: Any) -> NoReturn:
    """Raises: UnsupportedError: a node computes with a layer that has no weights here."""
    raise UnsupportedError(f"A node computes with the layer {name} of a parallel MODEL.", ELSEWHERE)
