"""What acts between model calls: functions, wrappers and callbacks of a MODEL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_base
import comfy.samplers
from comfy.model_patcher import ModelPatcher

from .makers import is_cores_own, maker_of
from .patches import origin
from .refusal import is_set
from .shuffled_tokens import is_shuffling

# The wrapper by which a parallel MODEL's own loop is entered.
OWN = "parallel_mmdit"
# What ComfyUI's guiders put together of the other options.
_OF_GUIDERS = ("transformer_options", "to_load_options", "registered_hooks")
# What nodes of a pack tell each other: ComfyUI-ppm's, that NegPiP's patch hangs.
_OF_NODES = ("ppm_negpip",)
# What ComfyUI's loop is made of, by the module that has it.
_LOOP = {
    comfy.samplers: (
        *("sampling_function", "calc_cond_batch", "_calc_cond_batch", "cfg_function", "process_conds"),
        *("KSAMPLER.sample", "KSamplerX0Inpaint.__call__"),
        *(
            f"CFGGuider.{name}"
            for name in ("outer_sample", "inner_sample", "__call__", "outer_predict_noise", "predict_noise")
        ),
    ),
    comfy.k_diffusion.sampling: ("default_noise_sampler", "BrownianTreeNoiseSampler", "get_ancestral_step", "to_d"),
    comfy.model_base: ("BaseModel.apply_model", "BaseModel._apply_model"),
}
# What a MODEL puts in the place of its model's own, and the backend's loop reads from it, or another check does.
_READ_FROM_IT = ("model_sampling", "manual_cast_dtype")


def replaced_functions() -> Iterator[str]:
    """Functions of ComfyUI's own loop in whose place a pack has put others, for all MODELs."""
    for module, names in _LOOP.items():
        for name in names:
            function = attrgetter(name)(module)
            if not is_cores_own(function, module.__name__, name):
                yield f"{name}, which {maker_of(function) or 'a pack'} has replaced"


def loop_patches(model: ModelPatcher, options: Mapping[str, Any]) -> Iterator[str]:
    """What acts between model calls, of the MODEL and of a guider's options: only ComfyUI's own loop can heed it."""
    for key, value in options.items():
        if key not in (*_OF_GUIDERS, *_OF_NODES) and is_set(value):
            yield f"model option {key!r}{_by(value)}"
    for key, put in model.object_patches.items():
        if key not in _READ_FROM_IT and not is_shuffling(put):
            yield f"the object patch {key!r}"
    transformer_options = options.get("transformer_options", {})
    for kind in ("wrappers", "callbacks"):
        of_options = transformer_options.get(kind, {})
        for name in dict.fromkeys([*getattr(model, kind), *of_options]):
            by_key = {**getattr(model, kind).get(name, {}), **of_options.get(name, {})}
            yield from (
                f"{kind[:-1]} {name} of {key or 'another node'}" for key in by_key if by_key[key] and key != OWN
            )


def _by(value: Any) -> str:
    """Which nodes, or other classes and functions, an option has its functions from: " by Mahiro of nodes_mahiro"; empty without any."""
    made = [
        origin(function).partition(":")
        for function in (value if isinstance(value, list) else [value])
        if callable(function)
    ]
    found = dict.fromkeys((name.partition(".<locals>")[0], module) for module, _, name in made)
    told = dict.fromkeys(f"{name.rpartition('.')[0] or name} of {module}" for name, module in found)
    return f" by {' and '.join(told)}" if told else ""
