"""Skip-layer guidance, core's: joint blocks that hand their tokens on as they came, while it evaluates its weaker model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, SkipBlocks
from .patches import Call, Guidance, Hung, Kind, Patch, closed_over, hands_on, in_node, origin

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
    named, depth = _layers(closed_over(function)), len(_joint_blocks(network))
    if outside := [number for number in named if depth and number >= depth]:
        numbers = ", ".join(map(str, outside))
        yield f"the layers {numbers} of skip-layer guidance: this model's are 0 to {depth - 1}"


def _joint_blocks(network: Any) -> Sequence[Module]:
    """None of a network that isn't of SD3's kind."""
    return getattr(network, "joint_blocks", ())


def hung_beside_cond(function: Any) -> Hung | None:
    """What skip-layer guidance hangs for a weaker model's evaluation of cond; None of another version, and where it does nothing."""
    made_with = closed_over(function)
    return _hung(made_with, branch=0) if made_with.get("scale", 0) > 0 else None


def hung_in_uncond(function: Any) -> Hung | None:
    """As `hung_beside_cond`, of its Simple form, in the evaluation of uncond."""
    return _hung(closed_over(function), branch=1)


def _hung(made_with: Mapping[str, Any], branch: int) -> Hung | None:
    if not {"skip", "sigma_start", "sigma_end"} <= made_with.keys():
        return None
    patches = [Patch("dit", ("double_block", number), made_with["skip"]) for number in _layers(made_with)]
    return Hung(patches, branch=branch, start=float(made_with["sigma_start"]), end=float(made_with["sigma_end"]))


def _layers(made_with: Mapping[str, Any]) -> Sequence[int]:
    found: Sequence[int] = made_with.get("double_layers", made_with.get("layers", ()))
    return found


KIND = Kind(
    _knows,
    _extras,
    dict.fromkeys(_named("post_cfg_function"), Guidance(hung_beside_cond, _outside))
    | dict.fromkeys(_named("calc_cond_batch_function"), Guidance(hung_in_uncond, _outside)),
)
