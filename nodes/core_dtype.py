"""The dtype `auto` where ComfyUI was told one for its own models."""

from __future__ import annotations

from pathlib import Path

from comfy.cli_args import args

from ..parallel_backend import Backend
from ..parallel_backend.config import AUTO

_FLAGS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def model_dtype(backend: Backend, path: Path, asked: str) -> str:
    """What ranks hold and compute the file in: as asked; as ComfyUI was started (--bf16-unet); else as suits all their cards."""
    return asked if asked != AUTO else _told("unet") or backend.model_dtype(path)


def vae_dtype(backend: Backend, asked: str, *, overflows: bool) -> str:
    """As `model_dtype`, of a VAE; float32 in place of a float16 that one of SDXL's kind `overflows` in."""
    dtype = asked if asked != AUTO else _told("vae") or backend.vae_dtype()
    return "float32" if overflows and dtype == "float16" else dtype


def _told(part: str) -> str | None:
    told = [dtype for flag, dtype in _FLAGS.items() if getattr(args, f"{flag}_{part}", False)]
    if getattr(args, "force_fp32", False):
        told.append("float32")
    if getattr(args, "force_fp16", False) and part == "unet":
        told.append("float16")
    return told[0] if told else None
