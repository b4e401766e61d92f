"""Token perturbation guidance of the pack sd-perturbed-attention: its weaker model's transformer blocks shuffle their tokens.

The node puts its own forward in the place of each block's, and sets a transformer option where they are to shuffle. These are asked
for the orders that they draw, in the network's order: then ComfyUI's generator gives what it gives on a local MODEL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from inspect import unwrap
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, ShuffledTokens
from . import hyper_tile, shifted_windows
from .asking import with_others
from .layers import is_own
from .patches import FORWARD, Call, Guidance, Kind, Patch, closed_over, origin, patches_in
from .perturbed_pack import hung_by_pack
from .refusal import ELSEWHERE
from .unet_places import blocks_of, sides_at

_FORWARD = "tpg_nodes:tpg_forward_wrapper.<locals>.forward"
_GUIDANCE = "tpg_nodes:TokenPerturbationGuidance.patch.<locals>.post_cfg_function"
_OPTION, _INNER = "tpg", "forward_orig"


def is_shuffling(function: Any) -> bool:
    """Whether it is the node's, around a block's own or another of the node's: ComfyUI leaves those there while a MODEL is loaded."""
    if not isinstance(function, FunctionType) or origin(function) != _FORWARD:
        return False
    held = closed_over(_plain(function))
    inner = held.get(_INNER)
    return held.keys() == {_INNER} and (is_shuffling(inner) or is_own(getattr(inner, "__self__", None), FORWARD, inner))


def _plain(function: FunctionType) -> FunctionType:
    """Without the decorator that turns gradients off."""
    return unwrap(function)  # type: ignore[return-value]


def _knows(patch: Patch) -> bool:
    """It hangs nothing where patches hang."""
    return False


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: what stands in a block's place, and would be told to shuffle, isn't known; or attentions draw, too."""
    places, orders = [], []
    for place, block in blocks_of(call.network):
        forward = vars(block).get(FORWARD)
        if forward is None or is_own(block, FORWARD, forward):
            continue
        if not is_shuffling(forward):
            raise UnsupportedError(
                f"A parallel MODEL can't honour the {_OPTION} option at {' '.join(map(str, place))}.", ELSEWHERE
            )
        rows, columns = sides_at(place, call)
        places.append(place)
        orders.append(_drawn(forward, torch.arange(rows * columns, device=call.device)[None, :, None]))
    if places:
        _check_draws(call)
        # Drawn for this evaluation alone.
        yield ShuffledTokens(places=places, orders=torch.cat(orders).cpu(), **call.alone)


def _drawn(forward: FunctionType, tokens_1L1: Tensor) -> Tensor:
    """(L,): as a block would be given tokens, each its own number, by the node's code."""
    plain = _plain(forward)
    inner = closed_over(plain)[_INNER]
    asked = with_others(plain, held={_INNER: _as_given})
    given: Tensor = asked(tokens_1L1, None, {_OPTION: True})
    return _drawn(inner, given) if is_shuffling(inner) else given[0, :, 0]


def _as_given(x: Tensor, **_: Any) -> Tensor:
    return x


def _check_draws(call: Call) -> None:
    """Raises: UnsupportedError: attentions draw between its blocks from the generator that gives it its orders: ComfyUI's of the CPU."""
    if torch.device(call.device).type != "cpu":
        return
    for patch in patches_in(call.options):
        if hyper_tile.draws(patch) or shifted_windows.KIND.knows(patch):
            raise UnsupportedError(
                f"A parallel MODEL can't honour token perturbation guidance beside {patch.told}, where ComfyUI computes on the CPU.",
                "Remove one of them, or start ComfyUI with a GPU.",
            )


KIND = Kind(
    _knows,
    _extras,
    {_GUIDANCE: Guidance(partial(hung_by_pack, options={_OPTION: True}))},
    option=_OPTION,
    left=lambda attribute, value: attribute == FORWARD and is_shuffling(value),
)
