"""Perturbed-attention guidance: self-attentions that give each token its own value, while it evaluates its weaker model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, PerturbedAttention
from .patches import Call, Kind, Patch, hands_on, origin
from .unet_places import places_of

_CORE = "nodes_pag:PerturbedAttentionGuidance"


def _named(function: str) -> list[str]:
    return [f"{_CORE}.{method}.<locals>.{function}" for method in ("execute", "patch")]


def _knows(patch: Patch) -> bool:
    """A function that gives the values as they came, whatever else it is called with."""
    named = patch.kind == "attn1" and origin(patch.function) in _named("perturbed_attention")
    return named and hands_on(patch.function, 2, arguments=4)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    if places := [place for patch in patches for place in places_of(patch, call)]:
        yield PerturbedAttention(places=places)


def _any_settings(function: Any, network: Module) -> Iterator[str]:
    return iter(())


KIND = Kind(_knows, _extras, dict.fromkeys(_named("post_cfg_function"), _any_settings))
