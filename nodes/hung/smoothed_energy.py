"""Smoothed energy guidance of the pack sd-perturbed-attention: queries blurred over the picture in its weaker model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, BlurQueries, PlaceName
from .known_functions import closed_over
from .patches import Call, Kind, Patch, is_made_by
from .unet_places import blocks_outside, places_of

_ATTENTION = "guidance_utils:seg_attention_wrapper.<locals>.seg_attention"
_GUIDANCE = "pag_nodes:SmoothedEnergyGuidanceAdvanced.patch.<locals>.post_cfg_function"


def _knows(patch: Patch) -> bool:
    return is_made_by(patch, "attn1", (_ATTENTION,), {"attention", "blur_sigma"})


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    by_blur: dict[float | None, list[PlaceName]] = {}
    for patch in patches:
        sigma = float(closed_over(patch.function)["blur_sigma"])
        by_blur.setdefault(sigma if sigma >= 0 else None, []).extend(places_of(patch, call))
    # Its function hangs these for the evaluations in which they act, and takes them away after each.
    only = {"start": call.sigma, "end": call.sigma}
    return [BlurQueries(places=places, blur=blur, **only) for blur, places in by_blur.items() if places]


def _refused(function: Any, network: Module) -> Iterator[str]:
    made_with = closed_over(function)
    if made_with.get("blur_sigma") == 0:
        yield "a blur_sigma of 0 (Smoothed Energy Guidance), which makes its picture NaN"
    yield from blocks_outside(made_with.get("blocks", ()), network, "Smoothed Energy Guidance")


KIND = Kind(_knows, _extras, {_GUIDANCE: _refused})
