"""The dtype `auto` where ComfyUI, or one of its loaders, was told one for its own models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy.cli_args import args

from ..parallel_backend import Backend
from ..parallel_backend.config import AUTO, DTYPES

_FLAGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_NOT_HELD = ("fp64", "fp8_e4m3fn", "fp8_e5m2", "fp8_e8m0fnu")
_WHY = "ranks hold a file's quantised weights as they are, all others in float16, bfloat16 or float32"


def model_dtype(backend: Backend, path: Path, asked: str) -> str:
    """What ranks hold and compute the file in: as asked; as ComfyUI was started (--bf16-unet); else as suits all their cards."""
    return asked if asked != AUTO else _told("unet") or backend.model_dtype(path)


def vae_dtype(backend: Backend, asked: str) -> str:
    """As `model_dtype`, of a VAE. One that overflows in float16 leaves it when it does: see RemoteVAE.decode."""
    return asked if asked != AUTO else _told("vae") or backend.vae_dtype()


def unheeded(part: str, asked: str) -> str:
    """A line on the dtype that ComfyUI was started with and ranks can't take; empty where there is none, or another was asked for."""
    if asked != AUTO:
        return ""
    flags = [f"{dtype}_{part}" for dtype in _NOT_HELD if getattr(args, f"{dtype}_{part}", False)]
    return " ".join(f"ComfyUI's --{flag.replace(f'_{part}', f'-{part}')} is not heeded: {_WHY}." for flag in flags)


def told_by_loader(options: Mapping[str, Any]) -> str:
    """The dtype in a loader's options, if ranks can hold it; else auto."""
    dtype = _of_loader(options)
    return dtype if dtype in DTYPES else AUTO


def unheeded_of_loader(options: Mapping[str, Any], asked: str) -> str:
    """As `unheeded`, of what a loader was told: the fp8 of Load Diffusion Model's weight_dtype."""
    dtype = _of_loader(options)
    if asked != AUTO or not dtype:
        return ""
    return f"The loader's dtype {dtype} is not heeded: {_WHY}."


def _of_loader(options: Mapping[str, Any]) -> str:
    dtype = options.get("dtype") or options.get("weight_dtype")
    return str(dtype).removeprefix("torch.") if dtype else ""


def _told(part: str) -> str | None:
    told = [dtype for flag, dtype in _FLAGS.items() if getattr(args, f"{flag}_{part}", False)]
    if getattr(args, "force_fp32", False):
        told.append("float32")
    if getattr(args, "force_fp16", False) and part == "unet":
        told.append("float16")
    return told[0] if told else None
