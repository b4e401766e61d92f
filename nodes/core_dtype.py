"""The dtype `auto` where ComfyUI, or one of its loaders, was told one for its own models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.cli_args import args

from ..parallel_backend import Backend
from ..parallel_backend.config import AUTO, CAST_TO, DTYPES, FP8

_FLAGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FP8_FLAGS = {"fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_NOT_HELD = ("fp64", "fp8_e8m0fnu")
_WHY = (
    "ranks hold weights in float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, or as the file has them quantised"
)


def weights_dtype(of_mesh: str, compiles: bool, options: Mapping[str, Any]) -> tuple[str, list[str]]:
    """What weights are to be held in, and lines on what of flags and a loader's options can't be heeded.

    Args:
        of_mesh, compiles: what Mesh Config says. options: what a loader was told, which counts where that leaves the dtype open.
    """
    asked = told_by_loader(options) if of_mesh == AUTO else of_mesh
    dtype, lines = model_dtype(asked), [unheeded(asked), unheeded_of_loader(options, asked)]
    if compiles and of_mesh == AUTO and dtype in CAST_TO:
        why = "compile in Mesh Config is for weights of half precision or float32"
        return AUTO, [*lines, f"The dtype {dtype} is not heeded: {why}."]
    return dtype, lines


def model_dtype(asked: str) -> str:
    """What ranks are to hold the weights of a model in: as asked; as ComfyUI was started (--bf16-unet); else auto."""
    return asked if asked != AUTO else _told("unet", _FLAGS | _FP8_FLAGS) or AUTO


def computing_dtype(held: str) -> str:
    """What is computed in where weights are held in fp8: as ComfyUI was started; a loader's own fp8 heeds --force-fp32 and -fp16 alone."""
    return _told("unet", _FLAGS if held == FP8 else {}) or AUTO


def vae_dtype(backend: Backend, asked: str) -> str:
    """As `model_dtype`, of a VAE, which is never held in fp8. One that overflows in float16 leaves it then: see RemoteVAE.decode."""
    return asked if asked in DTYPES else _told("vae", _FLAGS) or backend.vae_dtype()


def fp8_products(options: Mapping[str, Any]) -> dict[str, bool]:
    """How ComfyUI, or its loader with these options, was told to make products in fp8, as `Backend.load_model` takes it."""
    fast = any(getattr(feature, "value", feature) == "fp8_matrix_mult" for feature in getattr(args, "fast", None) or ())
    fast_fp8 = fast or bool(options.get("fp8_optimizations"))
    return {"fast_fp8": fast_fp8, "has_fp8": bool(getattr(args, "supports_fp8_compute", False))}


def unheeded(asked: str) -> str:
    """A line on the dtype that ComfyUI was started with and ranks can't take; empty where there is none, or another was asked for."""
    if asked != AUTO:
        return ""
    flags = [dtype for dtype in _NOT_HELD if getattr(args, f"{dtype}_unet", False)]
    return " ".join(f"ComfyUI's --{flag}-unet is not heeded: {_WHY}." for flag in flags)


def told_by_loader(options: Mapping[str, Any]) -> str:
    """The dtype in a loader's options, if ranks can hold it; else auto."""
    dtype = _of_loader(options)
    return dtype if dtype in (*DTYPES, *CAST_TO) else AUTO


def unheeded_of_loader(options: Mapping[str, Any], asked: str) -> str:
    """As `unheeded`, of what a loader was told."""
    dtype = _of_loader(options)
    if asked != AUTO or not dtype:
        return ""
    return f"The loader's dtype {dtype} is not heeded: {_WHY}."


def _of_loader(options: Mapping[str, Any]) -> str:
    dtype = options.get("dtype") or options.get("weight_dtype")
    return str(dtype).removeprefix("torch.") if dtype else ""


def _told(part: str, flags: Mapping[str, str]) -> str | None:
    told = [dtype for flag, dtype in flags.items() if getattr(args, f"{flag}_{part}", False)]
    if getattr(args, "force_fp32", False):
        told.append("float32")
    if getattr(args, "force_fp16", False) and part == "unet":
        told.append("float16")
    return told[0] if told else None
