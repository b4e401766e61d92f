"""The one file that knows ComfyUI's dictionaries: CONDITIONING, LATENT, and what hangs on a MODEL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..parallel_backend import Conditioning
from ..parallel_backend.errors import InputError, UnsupportedError

ON_KSAMPLER = "Use KSampler or SamplerCustomAdvanced on the same MODEL; they sample on the backend step by step."
# What stock sampling passes to a model's forward by itself.
FORWARD_OPTIONS = frozenset(
    {"cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "prefetch_dynamic_vbars"}
)
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


def flow_shift(model: ModelPatcher) -> float:
    """The shift of the MODEL's sampling, 3 as the checkpoint says or what ModelSamplingSD3 set.

    Raises: UnsupportedError: its sampling was patched to another kind.
    """
    sampling = model.get_model_object("model_sampling")
    multiplier = getattr(sampling, "multiplier", None)
    plain = getattr(sampling, "noise_scale", 1.0) == 1.0
    if not isinstance(sampling, comfy.model_sampling.CONST) or multiplier != 1000 or not plain:
        raise UnsupportedError(
            f"The MODEL's sampling is {type(sampling).__name__}; ParallelSampler knows SD3's flow alone.", ON_KSAMPLER
        )
    return float(sampling.shift)


def sampling_patches(model: ModelPatcher) -> Iterator[str]:
    """A change of what the model's output means, of its name, where the file alone decides that."""
    patched = model.object_patches.get("model_sampling")
    if patched is not None:
        yield f"model sampling changed to {' + '.join(c.__name__ for c in type(patched).__bases__)}"


def weight_patches(model: ModelPatcher) -> Iterator[str]:
    """What hangs on the MODEL and would change its weights or its layers, each by its name."""
    if model.patches:
        yield f"a LoRA or weight patch on {len(model.patches)} weights"
    if getattr(model, "weight_wrapper_patches", None):
        yield "weight wrappers"
    if getattr(model, "injections", None):
        yield f"injections ({', '.join(model.injections)})"
    if getattr(model, "hook_patches", None):
        yield "weight hooks"
    for key in model.object_patches:
        if key.split(".")[0] == "diffusion_model":
            yield f"the object patch {key!r}"
    yield from transformer_patches(model.model_options.get("transformer_options", {}))


def transformer_patches(options: Mapping[str, Any]) -> Iterator[str]:
    """Patches in transformer_options that live inside the model: attention and block patches."""
    for kind in ("patches", "patches_replace"):
        for name, entries in options.get(kind, {}).items():
            if entries:
                yield f"{kind} {name!r}"
    for key, value in options.items():
        if key not in FORWARD_OPTIONS and key not in ("patches", "patches_replace") and value:
            yield f"transformer option {key!r}"


def loop_patches(model: ModelPatcher) -> Iterator[str]:
    """What hangs on the MODEL and acts between model calls: it can run only where ComfyUI runs the loop."""
    for key, value in model.model_options.items():
        if key != "transformer_options" and value:
            yield f"model option {key!r}"
    for kinds, what in ((model.wrappers, "wrapper"), (model.callbacks, "callback")):
        for kind, by_key in kinds.items():
            for key, entries in by_key.items():
                if entries:
                    yield f"{what} {kind} of {key or 'another node'}"
    for kind in ("wrappers", "callbacks"):
        for name, by_key in model.model_options.get("transformer_options", {}).get(kind, {}).items():
            if any(by_key.values()):
                yield f"{kind[:-1]} {name}"


def refuse(found: Iterator[str], where: str, remedy: str) -> None:
    """Raises UnsupportedError that names everything in `found`; nothing where it is empty."""
    names = list(found)
    if names:
        raise UnsupportedError(f"{where} can't honour {'; '.join(names)}.", remedy)
