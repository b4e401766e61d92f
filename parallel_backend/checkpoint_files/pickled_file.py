"""Checkpoints that torch saved (.ckpt, .pt, .pth): read by its weights-only reader, which builds tensors and runs nothing."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_file import check_there

PICKLED = (".ckpt", ".pt", ".pth", ".bin", ".pt2", ".pkl")
_ZIP = b"PK\x03\x04"
# In a training framework's file, the table beside steps and optimizers.
_TABLE = "state_dict"


class _Ignored:
    """Stands for a training framework's own object, of which no tensor is part."""

    def __init__(self, *args: object) -> None:
        pass


# What old checkpoints of Stable Diffusion hold beside their tensors; numbers and settings, which nobody reads.
_HARMLESS: list[Any] = [
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
    (_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "_codecs.encode"),
]


def is_pickled(path: Path) -> bool:
    """By the name that the file is asked for under: what a link leads to may have none of its own."""
    return path.suffix.lower() in PICKLED


def pickled_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Its tensors by name, mapped where torch can do that; on the device "meta" only their shapes.

    Raises: CheckpointError: not there, damaged, of something else than tensors, or a pickle that wants to run code.
    """
    check_there(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            loaded = torch.load(path, map_location=device, weights_only=True, mmap=_is_mappable(path))
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        if "weights_only" in str(error):
            raise _refused(path, "") from None
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path.name} can't be read: {words}.", "Download it again.") from None
    tensors = {str(name): value.detach() for name, value in _table(loaded).items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path.name} holds no table of tensors.", "Use the model's own file.")
    return tensors


def _table(loaded: Any) -> dict[Any, Any]:
    """As ComfyUI chooses it."""
    if not isinstance(loaded, dict):
        return {}
    inner = loaded.get(_TABLE, next(iter(loaded.values())) if len(loaded) == 1 else None)
    return inner if isinstance(inner, dict) else loaded


def _is_mappable(path: Path) -> bool:
    """Files from before torch 1.6 are read whole."""
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _refused(path: Path, words: str) -> CheckpointError:
    named = re.search(r"GLOBAL (\S+)", words)
    if named is None:
        return CheckpointError(
            f"{path.name} can't be read by torch's weights-only reader: it is damaged, or holds more than tensors.",
            "Download it again, or use its .safetensors form.",
        )
    return CheckpointError(
        f"{path.name} is a pickle of more than tensors, and opening it would run code ({named[1]}).",
        "Don't trust it; get the model's own file, best as .safetensors.",
    )
