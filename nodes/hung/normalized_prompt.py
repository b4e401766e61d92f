"""Normalized attention guidance of the pack sd-perturbed-attention: a replacement of each attention to the prompt, which holds its
own negative prompt's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, NormalizedPrompt, PlaceName
from .asked_patch import attention
from .asking import check, drawn, unknown, with_others
from .kept_extras import kept_extras
from .normalized_formula import NAME, guided_away
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, closed_over, origin
from .prompt_projection import OfPrompt
from .sigmas import above, in_fp32
from .unet_places import places_of

_ORIGIN = "nag_nodes:nag_attn2_replace_wrapper.<locals>.nag_attn2_replace"
_NUMBERS = ("nag_scale", "tau", "alpha", "sigma_start", "sigma_end")
_HELD = {*_NUMBERS, "k_neg", "v_neg", "prev_attn2_replace"}


def _knows(patch: Patch) -> bool:
    if patch.kind != "attn2" or origin(patch.function) != _ORIGIN:
        return False
    held = closed_over(patch.function)
    return held.keys() == _HELD and all(isinstance(held[name], OfPrompt) for name in ("k_neg", "v_neg"))


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Those that act at some step. For the same patches they are the same objects, whose tensors are sent once."""
    return kept_extras(patches, call, (), lambda: _translated(patches, call))


def _translated(patches: Sequence[Patch], call: Call) -> list[NormalizedPrompt[Tensor]]:
    """One for all places with the same settings. Raises: UnsupportedError: what a pack's function does is not known."""
    found: dict[Any, tuple[Tensor, list[PlaceName]]] = {}
    for patch in patches:
        held = closed_over(patch.function)
        places, prompt = places_of(patch, call), held["k_neg"].prompt
        if not places:
            continue
        _check_prompt(places, held["k_neg"], held["v_neg"], patch.function)
        key = (id(prompt), *(float(held[name]) for name in _NUMBERS))
        if key not in found:
            _check(patch.function)
        found.setdefault(key, (prompt, []))[1].extend(places)
    made = []
    for (_, scale, tau, alpha, start, end), (prompt, places) in found.items():
        if scale == 0 or start <= end:  # at no step
            continue
        range_of = {"start": None if start == inf else in_fp32(start), "end": None if end < 0 else above(end)}
        # Its scale is of what is added to cond's output; the paper's is that of cond's output itself.
        numbers = {"scale": scale + 1, "alpha": alpha, "tau": tau}
        made.append(NormalizedPrompt(places=places, prompt=prompt.cpu(), **numbers, **range_of))
    return made


def _check_prompt(places: Sequence[PlaceName], k: OfPrompt, v: OfPrompt, function: Any) -> None:
    """Raises: UnsupportedError: keys and values of another place, or of two prompts, or of several at once."""
    layers = {layer.layer.removesuffix(end) for layer, end in ((k, ".to_k"), (v, ".to_v"))}
    rows = k.prompt.shape[0] if k.prompt.ndim == 3 else 0
    if len(layers) > 1 or k.prompt is not v.prompt or places != [_place_of(k.layer)]:
        raise unknown(NAME, function, "it attends to keys and values of other layers than its own")
    if rows != 1:
        raise UnsupportedError(
            f"{NAME} ({pack_and_version(function)}) came with a negative prompt of {rows} rows.",
            "Give it one prompt: a conditioning that isn't batched.",
        )


def _place_of(layer: str) -> PlaceName:
    """Of a layer by its name in ComfyUI's UNet."""
    parts = layer.split(".")
    side = parts[0].partition("_")[0]
    return side, 0 if side == "middle" else int(parts[1]), int(parts[parts.index("transformer_blocks") + 1])


def _check(function: Any) -> None:
    """Its own code, with keys and values of known numbers. Raises: UnsupportedError: it gives something else than the ranks will."""
    held = closed_over(function)
    q, k, v = drawn(2, 3, 8), drawn(2, 4, 8), drawn(2, 5, 8)[:, :4]
    k_neg, v_neg = drawn(1, 6, 8), drawn(1, 7, 8)[:, :6]
    known = {"k_neg": k_neg, "v_neg": v_neg, "prev_attn2_replace": None, "sigma_start": inf, "sigma_end": -1.0}
    asked = with_others(function, {"optimized_attention": attention}, known)
    options = {"n_heads": 2, "sigmas": torch.ones(1), "cond_or_uncond": [1, 0]}
    ours = attention(q, k, v, 2)
    scale, tau, alpha = (float(held[name]) for name in ("nag_scale", "tau", "alpha"))
    if scale != 0:
        cond = guided_away(ours[1:], attention(q[1:], k_neg, v_neg, 2), scale + 1, alpha, tau)
        ours = torch.cat([ours[:1], cond])
    check(NAME, function, lambda: (asked(q, k, v, options), ours))


KIND = Kind(_knows, _extras)
