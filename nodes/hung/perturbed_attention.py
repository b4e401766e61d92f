"""Perturbed-attention guidance, core's and that of the pack sd-perturbed-attention: self-attentions that give each token its own
value, while it evaluates its weaker model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, PerturbedAttention
from .patches import Call, Guidance, Hung, Kind, Patch, closed_over, hands_on, in_node, origin
from .perturbed_pack import hung_by_pack
from .unet_places import blocks_outside, places_of

_CORE = "nodes_pag:PerturbedAttentionGuidance"
_ATTENTION = "perturbed_attention"
_PACKS_ATTENTION = f"guidance_utils:{_ATTENTION}"
_PACKS_GUIDANCE = "pag_nodes:PerturbedAttention.patch.<locals>.post_cfg_function"


def _knows(patch: Patch) -> bool:
    """A function that gives the values as they came, whatever else it is called with."""
    known = (*in_node(_CORE, _ATTENTION), _PACKS_ATTENTION)
    return patch.kind == "attn1" and origin(patch.function) in known and hands_on(patch.function, 2, arguments=4)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    if places := [place for patch in patches for place in places_of(patch, call)]:
        yield PerturbedAttention(places=places)


def hung_by_core(function: Any) -> Hung | None:
    """What the function of core's node hangs; None of another version, and where it does nothing."""
    made_with = closed_over(function)
    if not {_ATTENTION, "unet_block", "unet_block_id", "scale"} <= made_with.keys() or made_with["scale"] == 0:
        return None
    place = made_with["unet_block"], made_with["unet_block_id"]
    return Hung([Patch("attn1", place, made_with[_ATTENTION])])


def _hung_by_pack(function: Any) -> Hung | None:
    return hung_by_pack(function, attention=function.__globals__.get(_ATTENTION))


def _blocks_refused(function: Any, network: Module) -> Iterator[str]:
    return blocks_outside(closed_over(function).get("blocks", ()), network, "Perturbed-Attention Guidance")


KIND = Kind(
    _knows,
    _extras,
    dict.fromkeys(in_node(_CORE, "post_cfg_function"), Guidance(hung_by_core))
    | {_PACKS_GUIDANCE: Guidance(_hung_by_pack, _blocks_refused)},
)
