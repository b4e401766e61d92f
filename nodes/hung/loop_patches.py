"""What acts between model calls: functions, wrappers and callbacks of a MODEL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher

from .refusal import is_set

# The wrapper by which a parallel MODEL's own loop is entered.
OWN = "parallel_mmdit"
# What ComfyUI's guiders put together of the other options.
_OF_GUIDERS = ("transformer_options", "to_load_options", "registered_hooks")
# What nodes of a pack tell each other: ComfyUI-ppm's, that NegPiP's patch hangs.
_OF_NODES = ("ppm_negpip",)
# What ComfyUI's loop is made of, in comfy.samplers.
_LOOP = (
    *("sampling_function", "calc_cond_batch", "_calc_cond_batch", "cfg_function", "process_conds"),
    *("KSAMPLER.sample", "KSamplerX0Inpaint.__call__"),
    *(
        f"CFGGuider.{name}"
        for name in ("outer_sample", "inner_sample", "__call__", "outer_predict_noise", "predict_noise")
    ),
)


def replaced_functions() -> Iterator[str]:
    """Functions of ComfyUI's own loop in whose place a pack has put others, for all MODELs."""
    for name in _LOOP:
        module = attrgetter(name)(comfy.samplers).__module__
        if module != comfy.samplers.__name__:
            yield f"{name}, which {module} has replaced"


def loop_patches(model: ModelPatcher, options: Mapping[str, Any]) -> Iterator[str]:
    """What acts between model calls, of the MODEL and of a guider's options: only ComfyUI's own loop can heed it."""
    for key, value in options.items():
        if key not in (*_OF_GUIDERS, *_OF_NODES) and is_set(value):
            yield f"model option {key!r}"
    transformer_options = options.get("transformer_options", {})
    for kind in ("wrappers", "callbacks"):
        of_options = transformer_options.get(kind, {})
        for name in dict.fromkeys([*getattr(model, kind), *of_options]):
            by_key = {**getattr(model, kind).get(name, {}), **of_options.get(name, {})}
            yield from (
                f"{kind[:-1]} {name} of {key or 'another node'}" for key in by_key if by_key[key] and key != OWN
            )
