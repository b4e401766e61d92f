"""MSW-MSA of the pack comfyui_jankhidiffusion: self-attentions in windows, which are shifted by chance.

How far, the node says itself: it is asked with tokens that have no values, for each attention in the network's order, as it draws for
each. So ComfyUI's own generator goes on as it would with a local MODEL.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, DownsampleByFour, Downscale, PlaceName, Rescale, ShiftedWindows
from . import deep_shrink, rau_net, token_merging
from .hidiffusion_pack import check_known, number_of
from .patches import Call, Kind, Patch, closed_over, origin, patches_in, replacement_at
from .refusal import ELSEWHERE
from .unet_places import all_places, sides_within

_NODE = "msw_msa_attention:ApplyMSWMSAAttention.patch.<locals>."
_CUTS, _JOINS = "attn_patch", "attn_output_patch"
_PLACES = {"attn1_patch": _CUTS, "attn1_output_patch": _JOINS, "attn2_patch": _CUTS, "attn2_output_patch": _JOINS}
_HOLDS = {_CUTS: {"cls", "config", "state"}, _JOINS: {"cls", "state"}}
_GAINS = [f"{when}_window{way}_multiplier" for way in ("", "_reverse") for when in ("pre", "post")]
_SETTINGS = {
    *("start_sigma", "end_sigma", "use_blocks", "scale_mode", "reverse_scale_mode", "silent", "last_shift_mode"),
    *("last_shift_strategy", "force_apply_attn2", "rescale_search_tolerance", "verbose", *_GAINS),
}
_SKIPS = "skip"


def _knows(patch: Patch) -> bool:
    return patch.kind in _PLACES and origin(patch.function) == _NODE + _PLACES[patch.kind]


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: another version of the pack, settings that can't be honoured, or other patches of these attentions."""
    for patch in patches:
        _check(patch)
    cuts = [patch.function for patch in patches if _PLACES[patch.kind] == _CUTS]
    _check_alone(cuts, call)
    if call.sigma is None:
        return []
    sides = sides_within(call, _resizes(call))
    windows: list[dict[PlaceName, tuple[int, int, int, int]]] = [{} for _ in cuts]
    for place in all_places(call.network):
        for found, function in zip(windows, cuts, strict=True):
            if (window := _asked(function, place, sides[place[:2]], call)) is not None:
                found[place] = window
    return [_extra(function, found, call.sigma) for function, found in zip(cuts, windows, strict=True) if found]


def _extra(function: Any, windows: dict[PlaceName, tuple[int, int, int, int]], sigma: float) -> ShiftedWindows:
    config = closed_over(function)["config"]
    before, cut, joined, after = (number_of(config, name) for name in _GAINS)
    return ShiftedWindows(
        places=list(windows),
        windows=list(windows.values()),
        # With sides that are even, neither is used.
        method="nearest" if config.scale_mode in ("disabled", _SKIPS) else str(config.scale_mode),
        back=str(config.reverse_scale_mode),
        gains=(before, cut, joined, after),
        start=sigma,
        end=sigma,
    )


def _check(patch: Patch) -> None:
    function: Any = patch.function
    is_known = set(function.__code__.co_freevars) == _HOLDS[_PLACES[patch.kind]]
    config: Any = getattr(closed_over(function).get("state"), "config", None)
    check_known("MSW-MSA attention", function, getattr(config, "_fields", None) if is_known else None, _SETTINGS)
    if config.force_apply_attn2:
        raise UnsupportedError(
            "A parallel MODEL can't honour force_apply_attn2 of MSW-MSA, windows of the prompt's tokens.",
            "Leave force_apply_attn2 out of the node's parameters.",
        )
    gains = [number_of(config, name) for name in _GAINS]
    if config.scale_mode == _SKIPS and any(gain != 1 for gain in gains):
        raise UnsupportedError(
            f"A parallel MODEL can't honour multipliers of MSW-MSA beside scale_mode {_SKIPS}.",
            "Choose another scale_mode, or leave the multipliers out.",
        )


def _asked(function: Any, place: PlaceName, sides: tuple[int, int], call: Call) -> tuple[int, int, int, int] | None:
    """Rows and columns as which it counts tokens, and its shifts, for this attention now; None where it leaves it whole."""
    made_with = closed_over(function)
    state, config = made_with["state"], made_with["config"]
    nothing = torch.zeros(1, sides[0] * sides[1], 1)
    given = {"sigmas": call.options["sigmas"], "block": place[:2], "original_shape": list(call.shape)}
    function(nothing, nothing, nothing, given)
    args, state.window_args = state.window_args, None
    if args is None:
        return None
    _, shift, rows, columns = args[0]
    if config.scale_mode == _SKIPS and (rows % 2 or columns % 2):
        return None
    # Neither side is shifted where one isn't.
    down, right = shift if shift[0] * shift[1] > 0 else (0, 0)
    return int(rows), int(columns), int(down), int(right)


def _check_alone(cuts: Sequence[Any], call: Call) -> None:
    """Raises: UnsupportedError: something else changes attentions that are cut in windows at whatever sigma."""
    configs = [config for function in cuts if _acts_ever(config := closed_over(function)["config"])]
    taken = [place for config in configs for place in all_places(call.network) if place[:2] in config.use_blocks]
    if not taken:
        return
    if len(set(taken)) < len(taken):
        raise UnsupportedError(
            "A parallel MODEL can't honour two MSW-MSA nodes at one attention.", "Name other blocks."
        )
    for place in taken:
        if (other := replacement_at(place, "attn1", call.options)) is not None:
            raise UnsupportedError(f"A parallel MODEL can't honour MSW-MSA beside {other.told}.", ELSEWHERE)
    for patch in patches_in(call.options):
        changes = patch.kind in ("attn1_patch", "attn1_output_patch") and not token_merging.KIND.knows(patch)
        if changes and not _knows(patch):
            raise UnsupportedError(f"A parallel MODEL can't honour MSW-MSA beside {patch.told}.", ELSEWHERE)


def _acts_ever(config: Any) -> bool:
    return bool(config.start_sigma >= config.end_sigma and config.start_sigma > 0)


def _resizes(call: Call) -> list[Downscale | Rescale | DownsampleByFour]:
    """What makes the picture within smaller in this call."""
    found: list[AnyExtra] = []
    for kind in (deep_shrink.KIND, rau_net.KIND):
        if patches := [patch for patch in patches_in(call.options) if kind.knows(patch)]:
            found += kind.extras(patches, call)
    resizing = [extra for extra in found if isinstance(extra, Downscale | Rescale | DownsampleByFour)]
    return [extra for extra in resizing if call.sigma is None or extra.is_at(call.sigma)]


def _step_by_step(patch: Patch) -> Iterator[str]:
    if _PLACES[patch.kind] == _CUTS:
        config = closed_over(patch.function).get("config")
        if not hasattr(config, "start_sigma") or _acts_ever(config):
            yield "MSW-MSA attention, which draws its shifts anew for each evaluation"


KIND = Kind(_knows, _extras, step_by_step=_step_by_step)
