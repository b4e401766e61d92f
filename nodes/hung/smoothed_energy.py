"""Smoothed energy guidance of the pack sd-perturbed-attention: queries blurred over the picture in its weaker model.

Before the ranks are told its numbers, its own code is asked what it makes of a known picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra, BlurQueries, PlaceName
from .asking import check, drawn, with_others
from .patches import Call, Guidance, Hung, Kind, Patch, closed_over, is_made_by
from .perturbed_pack import hung_by_pack
from .unet_places import blocks_outside, places_of

_WRAPPER = "seg_attention_wrapper"
_ATTENTION = f"guidance_utils:{_WRAPPER}.<locals>.seg_attention"
_NAME = "Smoothed Energy Guidance"
_GUIDANCE = "pag_nodes:SmoothedEnergyGuidanceAdvanced.patch.<locals>.post_cfg_function"


def _knows(patch: Patch) -> bool:
    return is_made_by(patch, "attn1", (_ATTENTION,), {"attention", "blur_sigma"})


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: a version that is not known."""
    _check(patches[0].function)
    by_blur: dict[float | None, list[PlaceName]] = {}
    for patch in patches:
        sigma = float(closed_over(patch.function)["blur_sigma"])
        by_blur.setdefault(sigma if sigma >= 0 else None, []).extend(places_of(patch, call))
    # Its function hangs these for the evaluations in which they act, and takes them away after each.
    return [BlurQueries(places=places, blur=blur, **call.alone) for blur, places in by_blur.items() if places]


def _check(function: Any) -> None:
    picture = drawn(1, 6 * 8, 2)
    mean = picture.mean(1, keepdim=True).expand_as(picture)
    options = {"n_heads": 1, "original_shape": [1, 4, 48, 64]}

    def blurred(blur: float) -> Tensor:
        asked = with_others(function, held={"attention": lambda q, *_, **__: q, "blur_sigma": blur})
        found: Tensor = asked(picture.clone(), picture, picture, options)
        return found

    check(_NAME, function, lambda: (blurred(0.4), _blurred_a_little(picture.view(6, 8, 2))))
    check(_NAME, function, lambda: (blurred(-1.0), mean))


def _blurred_a_little(picture_YXD: Tensor) -> Tensor:
    """(1, Y*X, D): by a Gaussian of 0.4 tokens, which reaches one to each side; the picture is mirrored at its edges."""
    beside = exp(-1 / (2 * 0.4**2))
    taps = torch.tensor([beside, 1.0, beside]) / (1 + 2 * beside)
    padded = F.pad(picture_YXD.permute(2, 0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, torch.outer(taps, taps)[None, None]).flatten(1).T[None]


def _refused(function: Any, network: Module) -> Iterator[str]:
    made_with = closed_over(function)
    if made_with.get("blur_sigma") == 0:
        yield f"a blur_sigma of 0 ({_NAME}), which makes its picture NaN"
    yield from blocks_outside(made_with.get("blocks", ()), network, _NAME)


def _hung(function: Any) -> Hung | None:
    made, blur = function.__globals__.get(_WRAPPER), closed_over(function).get("blur_sigma")
    return None if made is None or blur is None else hung_by_pack(function, attention=made(_of_no_use, blur))


def _of_no_use(*_: Any, **__: Any) -> None:
    """In place of an attention that nothing calls."""


KIND = Kind(_knows, _extras, {_GUIDANCE: Guidance(_hung, _refused)})
