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
from . import deep_shrink, rau_net
from .known_functions import closed_over
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, origin, patches_in
from .rau_net import number_of
from .refusal import ELSEWHERE, LOCALLY
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
_SCALES, _SKIPS = "utils:scale_samples", "skip"


def _knows(patch: Patch) -> bool:
    return patch.kind in _PLACES and origin(patch.function) == _NODE + _PLACES[patch.kind]


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: another version of the pack, settings that can't be honoured, or other patches of these attentions."""
    for patch in patches:
        _check(patch)
    cuts = [patch.function for patch in patches if _PLACES[patch.kind] == _CUTS]
    if call.sigma is None or not cuts:
        return []
    sides = sides_within(call, _resizes(call))
    windows: list[dict[PlaceName, tuple[int, int, int, int]]] = [{} for _ in cuts]
    for place in all_places(call.network):
        for found, function in zip(windows, cuts, strict=True):
            if (window := _asked(function, place, sides[place[:2]], call)) is not None:
                found[place] = window
    _check_alone(windows, call)
    return [_extra(function, found) for function, found in zip(cuts, windows, strict=True) if found]


def _extra(function: Any, windows: dict[PlaceName, tuple[int, int, int, int]]) -> ShiftedWindows:
    config = closed_over(function)["config"]
    before, cut, joined, after = (number_of(config, name) for name in _GAINS)
    return ShiftedWindows(
        places=list(windows),
        windows=list(windows.values()),
        # With sides that are even, neither is used.
        method="nearest" if config.scale_mode in ("disabled", _SKIPS) else str(config.scale_mode),
        back=str(config.reverse_scale_mode),
        gains=(before, cut, joined, after),
    )


def _check(patch: Patch) -> None:
    function, held = patch.function, _HOLDS[_PLACES[patch.kind]]
    state = closed_over(function).get("state")
    config = getattr(state, "config", None)
    if set(function.__code__.co_freevars) != held or set(getattr(config, "_fields", ())) != _SETTINGS:
        raise UnsupportedError(
            f"{pack_and_version(function)} hangs another MSW-MSA attention than the known one on the MODEL.",
            f"Use version 0.8.5 of that pack, or {LOCALLY}.",
        )
    resizes = function.__globals__.get("scale_samples")
    if origin(resizes) != _SCALES:
        raise UnsupportedError(
            f"MSW-MSA resizes by {origin(resizes)}, which another pack (ComfyUI-bleh) has put there.", ELSEWHERE
        )
    if config is not None and config.force_apply_attn2:
        raise UnsupportedError(
            "A parallel MODEL can't honour force_apply_attn2 of MSW-MSA, windows of the prompt's tokens.",
            "Leave force_apply_attn2 out of the node's parameters.",
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
        if any(number_of(config, name) != 1 for name in _GAINS):
            raise UnsupportedError(
                f"A parallel MODEL can't honour multipliers of MSW-MSA with scale_mode skip at {rows} x {columns} tokens.",
                "Choose another scale_mode, or sides that are multiples of 64 pixels.",
            )
        return None
    # Neither side is shifted where one isn't.
    down, right = shift if shift[0] * shift[1] > 0 else (0, 0)
    return int(rows), int(columns), int(down), int(right)


def _check_alone(windows: Sequence[dict[PlaceName, Any]], call: Call) -> None:
    """Raises: UnsupportedError: something else changes attentions that are cut in windows."""
    taken = [place for found in windows for place in found]
    if not taken:
        return
    if len(set(taken)) < len(taken):
        raise UnsupportedError(
            "A parallel MODEL can't honour two MSW-MSA nodes at one attention.", "Name other blocks."
        )
    replaced = call.options.get("patches_replace", {}).get("attn1", {})
    for place in taken:
        if place in replaced or place[:2] in replaced:
            told = " ".join(map(str, place))
            raise UnsupportedError(f"MSW-MSA cuts the attention at {told}, which another node replaces.", ELSEWHERE)
    for patch in patches_in(call.options):
        if patch.kind in ("attn1_patch", "attn1_output_patch") and not _knows(patch):
            raise UnsupportedError(f"A parallel MODEL can't honour MSW-MSA beside {patch.told}.", ELSEWHERE)


def _resizes(call: Call) -> list[Downscale | Rescale | DownsampleByFour]:
    """What makes the picture within smaller in this call."""
    found: list[AnyExtra] = []
    for kind in (deep_shrink.KIND, rau_net.KIND):
        if patches := [patch for patch in patches_in(call.options) if kind.knows(patch)]:
            found += kind.extras(patches, call)
    return [extra for extra in found if isinstance(extra, Downscale | Rescale | DownsampleByFour)]


def _step_by_step(patch: Patch) -> Iterator[str]:
    if _PLACES[patch.kind] == _CUTS:
        config = closed_over(patch.function).get("config")
        if getattr(config, "start_sigma", 1.0) > 0:
            yield "MSW-MSA attention, which draws its shifts anew for each evaluation"


KIND = Kind(_knows, _extras, step_by_step=_step_by_step)
