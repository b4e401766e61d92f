"""The file that a MODEL or a VAE comes from: ComfyUI's loaders leave it, with how they were called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
from comfy.model_patcher import ModelPatcher

from ..parallel_backend.errors import UnsupportedError
from .gguf_file import gguf_file

_MODEL_LOADERS = frozenset(
    {"load_checkpoint_guess_config", "load_checkpoint_guess_config_model_only", "load_diffusion_model"}
)
_VAE_LOADERS = frozenset({"load_checkpoint_guess_config", "load_checkpoint_vae_patcher", "load_vae_patcher"})
_LOAD_MODEL = (
    "Load it with Load Checkpoint or Load Diffusion Model, or with Load Parallel Checkpoint, MMDiT or UNet. "
    "Other packs' quantised forms than ComfyUI-GGUF's stay on their own loaders."
)
_LOAD_VAE = "Load it with Load Checkpoint or Load VAE, or with Patch Parallel VAE, which has taesd3 and taesdxl too."
# Core leaves it on a patcher: of a MODEL since 0.16, of a VAE since 0.23. What this pack leaves is on the network, which all
# clones share, where core doesn't take it for its own.
_CORES, _OURS = "cached_patcher_init", "parallel_mmdit_loaded_by"


@dataclass(frozen=True)
class LoaderFile:
    """What a loader was called with; `options` is what it was told of dtype, device and operations."""

    load: Any
    args: Sequence[Any]
    options: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return Path(self.args[0])


def leave(patcher: ModelPatcher, load: Any, args: Sequence[Any]) -> None:
    """`load` was called with `args`, the first of which is the file: known of all clones of the patcher from now on."""
    setattr(patcher.model, _OURS, (load, tuple(args)))


def left(patcher: ModelPatcher) -> tuple[Any, Sequence[Any]] | None:
    """What `leave` or a loader of core's left: the function and its arguments."""
    found = getattr(patcher, _CORES, None) or getattr(patcher.model, _OURS, None)
    return None if found is None else (found[0], found[1])


def model_file(model: ModelPatcher) -> LoaderFile:
    """Where the MODEL comes from. Raises: UnsupportedError: that isn't known, or a pack computes with its weights in its own way."""
    if (path := gguf_file(model)) is not None:
        return LoaderFile(comfy.sd.load_diffusion_model, (path,), {})
    file = _file(model, _MODEL_LOADERS, "MODEL", _LOAD_MODEL)
    operations = file.options.get("custom_operations")
    if operations is not None:
        name = getattr(operations, "__qualname__", type(operations).__name__)
        raise UnsupportedError(f"{file.path.name} was loaded with a pack's own operations ({name}).", _LOAD_MODEL)
    return file


def vae_file(patcher: ModelPatcher) -> LoaderFile:
    """Where the VAE of this patcher comes from. Raises: UnsupportedError: that isn't known."""
    return _file(patcher, _VAE_LOADERS, "VAE", _LOAD_VAE)


def _file(patcher: ModelPatcher, known: frozenset[str], what: str, remedy: str) -> LoaderFile:
    found = left(patcher)
    if found is None:
        raise UnsupportedError(f"The file of this {what} is not known: its loader has not left it.", remedy)
    load, args = found
    name = getattr(load, "__name__", type(load).__name__)
    if name not in known:
        raise UnsupportedError(f"The file of this {what} is not known: {load.__module__}.{name} loaded it.", remedy)
    return LoaderFile(load, args, inspect.signature(load).bind(*args).arguments.get("model_options") or {})
