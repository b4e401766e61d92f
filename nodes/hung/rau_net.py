"""RAUNet of the pack comfyui_jankhidiffusion: inner blocks of a UNet see a smaller picture than the outer ones.

The pack replaces forwards of ComfyUI's own layers as well: on a parallel MODEL these hang among the other patches, see
`nodes/remote_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from ...parallel_backend.rpc.extras import AnyExtra, DownsampleByFour, Rescale, RescaleBack, UpsampleBy
from .block_patches import AFTER_SKIP, INPUT, OUTPUT, acts, orders_of, range_of
from .hidiffusion_pack import check_known, number_of, scales_residuals
from .patches import FORWARD, Call, Kind, Patch, closed_over, origin

_LAYER = "raunet:HDForward"
_NODE = "raunet:ApplyRAUNet.patch.<locals>."
_FUNCTIONS = {INPUT: "input_block_patch", AFTER_SKIP: "input_block_patch", OUTPUT: "output_block_patch"}
_HOLDS = {
    "input_block_patch": {
        *("config", "downscale_factor", "downscale_factor_w", "ca_pixel_increment", "ms"),
        *("ca_fadeout_start_pct", "ca_start_pct", "ca_end_pct"),
    },
    "output_block_patch": {"config"},
}
_HELD_BY_LAYER = {"orig_block", "orig_forward", "config", "block_index", "forward"}
_SETTINGS = {
    *("start_sigma", "end_sigma", "ca_start_sigma", "ca_end_sigma", "use_blocks", "ca_use_blocks", "upscale_mode"),
    *("two_stage_upscale_mode", "ca_upscale_mode", "ca_downscale_mode", "ca_downscale_factor", "verbose"),
    *("ca_downscale_factor_w", "ca_input_after_skip_mode", "ca_avg_pool2d_ceil_mode", "ca_output_sigma_hack"),
    *(f"{ca}{when}_{way}scale_multiplier" for ca in ("", "ca_") for when in ("pre", "post") for way in ("up", "down")),
    *("ca_fadeout_start_sigma", "ca_fadeout_cap", "ca_latent_pixel_increment", "curr_sigma"),
}
# As the pack calls a method that torch knows by another name.
_METHODS = {"adaptive_avg_pool2d": "area"}


def is_forward(function: Any) -> bool:
    """Whether it stands in the place of a layer's forward."""
    return origin(function) == _LAYER


def _knows(patch: Patch) -> bool:
    if patch.kind == FORWARD:
        return is_forward(patch.function)
    return patch.kind in _FUNCTIONS and origin(patch.function) == _NODE + _FUNCTIONS[patch.kind]


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: another version of the pack, or settings that can't be honoured."""
    for patch in patches:
        _check(patch)
        if patch.kind == FORWARD:
            yield from _of_layer(patch.function)
    for kind in (INPUT, AFTER_SKIP):
        for first, function in orders_of(_knows, call, kind):
            yield from _rescaled(function, call, {"after_skip": kind == AFTER_SKIP, "first": first})
    for order, function in orders_of(_knows, call):
        yield from _rescaled_back(function, call, order)


def _check(patch: Patch) -> None:
    """Raises: UnsupportedError: it isn't as this version of the pack has it, or resizes by another pack's code."""
    function: Any = patch.function
    if patch.kind == FORWARD:
        is_known, code = vars(function).keys() == _HELD_BY_LAYER, type(function).__init__
        config = getattr(function, "config", None)
    else:
        is_known, code = set(function.__code__.co_freevars) == _HOLDS[_FUNCTIONS[patch.kind]], function
        config = closed_over(function).get("config")
    settings = [field.name for field in fields(config)] if is_known and is_dataclass(config) else None
    check_known("RAUNet", code, settings, _SETTINGS)


def _of_layer(layer: Any) -> Iterator[AnyExtra]:
    """A downsampling or an upsampling, where it acts."""
    config, block = layer.config, layer.orig_block
    side, number = ("output" if layer.forward.__name__ == "forward_upsample" else "input"), layer.block_index
    start, end = (number_of(config, name) for name in ("start_sigma", "end_sigma"))
    if (side, number) not in config.use_blocks or not (block.use_conv and block.dims == 2) or not acts(start, end):
        return
    found: dict[str, Any] = {"block": number, **range_of(start, end)}
    if side == "input":
        # The pack multiplies twice before.
        before = number_of(config, "pre_downscale_multiplier") ** 2
        after = number_of(config, "post_downscale_multiplier")
        yield DownsampleByFour(**found, before=before, after=after, scales_residuals=scales_residuals())
    else:
        before, after = number_of(config, "pre_upscale_multiplier"), number_of(config, "post_upscale_multiplier")
        two_stages = config.two_stage_upscale_mode
        halfway = None if two_stages == "disabled" else str(two_stages)
        yield UpsampleBy(**found, method=str(config.upscale_mode), halfway=halfway, before=before, after=after)


def _rescaled(function: Any, call: Call, found: dict[str, Any]) -> Iterator[AnyExtra]:
    made_with = closed_over(function)
    config = made_with["config"]
    blocks = _blocks(config, "input", len(call.network.input_blocks))  # type: ignore[arg-type]
    start, end = (number_of(config, name) for name in ("ca_start_sigma", "ca_end_sigma"))
    if not blocks or not acts(start, end):
        return
    share = 1.0
    if made_with["ca_fadeout_start_pct"] is not None and call.sigma is not None:
        if not start >= call.sigma >= end:
            return
        share, start, end = _share_of_scaling(function, made_with, call.sigma), call.sigma, call.sigma
    if share <= 0:
        return
    height, width = (float(made_with[name]) for name in ("downscale_factor", "downscale_factor_w"))
    if share < 1:
        height, width = (factor - (factor - 1.0) * (1.0 - share) for factor in (height, width))
    method = str(config.ca_downscale_mode)
    yield Rescale(
        blocks=blocks,
        factors=(height, width),
        unit=float(made_with["ca_pixel_increment"]),
        method=_METHODS.get(method, method),
        round_up=bool(config.ca_avg_pool2d_ceil_mode),
        before=number_of(config, "ca_pre_downscale_multiplier"),
        after=number_of(config, "ca_post_downscale_multiplier"),
        scales_residuals=scales_residuals(),
        **found,
        **range_of(start, end),
    )


def _share_of_scaling(function: Any, made_with: dict[str, Any], sigma: float) -> float:
    """How much of the scaling is left at this sigma, by the pack's own functions."""
    names, config = function.__globals__, made_with["config"]
    passed = names["sigma_to_pct"](made_with["ms"], torch.tensor(sigma))
    between = (made_with["ca_start_pct"], made_with["ca_end_pct"], made_with["ca_fadeout_start_pct"])
    return float(names["fade_scale"](passed, *between, config.ca_fadeout_cap))


def _rescaled_back(function: Any, call: Call, order: int) -> Iterator[AnyExtra]:
    config = closed_over(function)["config"]
    blocks = _blocks(config, "output", len(call.network.output_blocks))  # type: ignore[arg-type]
    start, end = (number_of(config, name) for name in ("ca_start_sigma", "ca_end_sigma"))
    if blocks and acts(start, end):
        yield RescaleBack(
            blocks=blocks,
            method=str(config.ca_upscale_mode),
            before=number_of(config, "ca_pre_upscale_multiplier"),
            after=number_of(config, "ca_post_upscale_multiplier"),
            order=order,
            **range_of(start, end),
        )


def _blocks(config: Any, side: str, count: int) -> tuple[int, ...]:
    """Those of one side that the model has: at others nothing is called."""
    return tuple(sorted(number for of, number in config.ca_use_blocks if of == side and 0 <= number < count))


def _step_by_step(patch: Patch) -> Iterator[str]:
    if patch.kind in (INPUT, AFTER_SKIP) and closed_over(patch.function).get("ca_fadeout_start_pct") is not None:
        yield "RAUNet with a ca_fadeout_start_time, whose sizes change from step to step"


KIND = Kind(_knows, _extras, step_by_step=_step_by_step)
