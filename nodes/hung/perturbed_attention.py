"""Perturbed-attention guidance, core's and that of the pack sd-perturbed-attention: self-attentions that give each token its own
value, while it evaluates its weaker model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, PerturbedAttention
from .patches import Call, Kind, Patch, closed_over, hands_on, in_node, origin
from .unet_places import blocks_outside, places_of

_CORE = "nodes_pag:PerturbedAttentionGuidance"
_PACKS_ATTENTION = "guidance_utils:perturbed_attention"
_PACKS_GUIDANCE = "pag_nodes:PerturbedAttention.patch.<locals>.post_cfg_function"


def _knows(patch: Patch) -> bool:
    """A function that gives the values as they came, whatever else it is called with."""
    known = (*in_node(_CORE, "perturbed_attention"), _PACKS_ATTENTION)
    return patch.kind == "attn1" and origin(patch.function) in known and hands_on(patch.function, 2, arguments=4)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    if places := [place for patch in patches for place in places_of(patch, call)]:
        yield PerturbedAttention(places=places)


def _any_settings(function: Any, network: Module) -> Iterator[str]:
    return iter(())


def _blocks_refused(function: Any, network: Module) -> Iterator[str]:
    return blocks_outside(closed_over(function).get("blocks", ()), network, "Perturbed-Attention Guidance")


KIND = Kind(
    _knows,
    _extras,
    dict.fromkeys(in_node(_CORE, "post_cfg_function"), _any_settings) | {_PACKS_GUIDANCE: _blocks_refused},
)
