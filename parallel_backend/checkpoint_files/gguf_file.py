"""GGUF files by their headers: which tensors they hold, of which shape and type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError

SUFFIX = ".gguf"
# Where ComfyUI-GGUF's converter keeps the shape of a tensor that it had to fold to whole blocks.
_SHAPE = "comfy.gguf.orig_shape."
# What is no quantised type.
PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Args:
        kind: as gguf names its type. shape: of its values.
        data: mapped, not read: a numpy array, bytes where the type is a quantised one.
    """

    kind: str
    shape: tuple[int, ...]
    data: Any


def is_gguf(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == SUFFIX


def gguf_tensors(path: Path) -> dict[str, GGUFTensor]:
    """By name. Raises: CheckpointError: no GGUF file, or not a whole one. UnsupportedError: no gguf package."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
        return {
            tensor.name: GGUFTensor(tensor.tensor_type.name, _shape(reader, tensor), tensor.data)
            for tensor in reader.tensors
        }
    except OSError as error:
        raise CheckpointError(f"{path} can't be opened: {error.strerror}.", "Check the name and the file.") from None
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        AttributeError,
    ) as error:  # the reader checks little: a header that lies ends in whatever it stumbles over
        raise CheckpointError(
            f"{path.name} is no whole GGUF file ({type(error).__name__}: {str(error)[:200]}).", "Download it again."
        ) from None


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """Raises: ValueError: no values, or not as many as the tensor has."""
    stored = tuple(int(side) for side in reversed(tensor.shape))
    told = reader.get_field(_SHAPE + tensor.name)
    shape = stored if told is None else tuple(int(told.parts[index][0]) for index in told.data)
    if any(side < 1 for side in shape) or prod(shape) != prod(stored):
        raise ValueError(f"{tensor.name} has {list(stored)} values, its shape is {list(shape)}")
    return shape


def gguf_entries(path: Path) -> dict[str, dict[str, Any]]:
    """As the header of a safetensors file tells them: dtype and shape by name; a quantised one counts as F16."""
    return {
        name: {"dtype": tensor.kind if tensor.kind in PLAIN else "F16", "shape": list(tensor.shape)}
        for name, tensor in gguf_tensors(path).items()
    }


@cache
def gguf_package() -> Any:
    """Raises: UnsupportedError: it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            "GGUF files are read by the package gguf, which is not installed.",
            "Run pip install gguf in ComfyUI's environment.",
        ) from None
    return gguf
