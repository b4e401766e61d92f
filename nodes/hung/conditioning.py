"""CONDITIONING of one entry as tensors; what else an entry may carry is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...parallel_backend import Conditioning
from ...parallel_backend.errors import InputError, UnsupportedError
from .refusal import ON_KSAMPLER

# Numbers that text encode nodes of SDXL leave.
_SIZES = frozenset({"width", "height", "crop_w", "crop_h", "target_width", "target_height", "aesthetic_score"})
# Keys that text encode nodes of other families leave, and that a model doesn't read.
_UNREAD_BY_SD3 = _SIZES | {"guidance"}
_UNREAD_BY_SDXL = frozenset({"guidance"})
_NEUTRAL: Mapping[str, Any] = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}


def sd3_conditioning(conditioning: list[Any], name: str) -> Conditioning:
    """A CONDITIONING of one entry as tensors.

    Raises:
        UnsupportedError: several entries, or an area, a mask, a ControlNet, hooks, ...: named.
        InputError: no pooled output.
    """
    context, options = _one_entry(conditioning, name, _UNREAD_BY_SD3)
    return Conditioning(context, options["pooled_output"])


def sdxl_conditioning(conditioning: list[Any], name: str, model: ModelPatcher, latent: Tensor) -> Conditioning:
    """A CONDITIONING of one entry as tensors, its sizes (by default the latent's) embedded as ComfyUI embeds them.

    Raises: as `sd3_conditioning`.
    """
    context, options = _one_entry(conditioning, name, _UNREAD_BY_SDXL | _SIZES)
    height, width = (8 * side for side in latent.shape[2:])
    sized = {"width": width, "height": height} | {key: options[key] for key in _SIZES if options.get(key) is not None}
    pooled = model.model.encode_adm(pooled_output=options["pooled_output"], prompt_type=name, **sized)
    return Conditioning(context, pooled)


def _one_entry(conditioning: list[Any], name: str, known: frozenset[str]) -> tuple[Tensor, dict[str, Any]]:
    if len(conditioning) != 1:
        raise UnsupportedError(
            f"The {name} conditioning has {len(conditioning)} entries; ParallelSampler takes one.", ON_KSAMPLER
        )
    context, options = conditioning[0]
    for key, value in options.items():
        if key == "pooled_output" or key in known or value is None:
            continue
        if key in _NEUTRAL and value == _NEUTRAL[key]:
            continue
        raise UnsupportedError(
            f"The {name} conditioning carries {key!r}, which ParallelSampler can't honour.", ON_KSAMPLER
        )
    if options.get("pooled_output") is None:
        raise InputError(
            f"The {name} conditioning has no pooled output.", "Encode it with the text encoders of this model."
        )
    return context, options
