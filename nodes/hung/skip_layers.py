"""Skip-layer guidance, core's: joint blocks that hand their tokens on as they came, while it evaluates its weaker model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, SkipBlocks
from .patches import Call, Kind, Patch, closed_over, hands_on, in_node, origin

_NODES = ("SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple", "SkipLayerGuidanceSD3")
_OLDER = "skip_guidance"


def _named(function: str) -> list[str]:
    nodes = [f"{module}:{node}" for module in ("nodes_slg", "nodes_sd3") for node in _NODES]
    return [written for node in nodes for written in in_node(node, function, _OLDER)]


def _knows(patch: Patch) -> bool:
    """A function that gives its arguments back as they came."""
    named = patch.kind == "dit" and origin(patch.function) in _named("skip")
    return named and hands_on(patch.function, 0, arguments=2)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Single blocks, which SD3 hasn't, are named by the node for other models: here as in ComfyUI they are nothing."""
    blocks = [patch.place[1] for patch in patches if patch.place is not None and patch.place[0] == "double_block"]
    depth = len(_joint_blocks(call.network))
    if known := sorted({block for block in blocks if block < depth}):
        yield SkipBlocks(blocks=known)


def _outside(function: Any, network: Module) -> Iterator[str]:
    """Blocks that the model hasn't, where it has joint blocks at all."""
    made_with = closed_over(function)
    named = made_with.get("double_layers", made_with.get("layers", ()))
    depth = len(_joint_blocks(network))
    if outside := [number for number in named if depth and number >= depth]:
        numbers = ", ".join(map(str, outside))
        yield f"the layers {numbers} of skip-layer guidance: this model's are 0 to {depth - 1}"


def _joint_blocks(network: Any) -> Sequence[Module]:
    """None of a network that isn't of SD3's kind."""
    return getattr(network, "joint_blocks", ())


KIND = Kind(
    _knows,
    _extras,
    {name: _outside for function in ("post_cfg_function", "calc_cond_batch_function") for name in _named(function)},
)
