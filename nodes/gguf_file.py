"""The file of a MODEL that ComfyUI-GGUF loaded. Its loader leaves no name, but its weights are that file, mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..parallel_backend.checkpoint_files.gguf_file import is_gguf
from ..parallel_backend.errors import UnsupportedError

_MAPS = Path("/proc/self/maps")


def gguf_file(model: ModelPatcher) -> Path | None:
    """None where it is no MODEL of ComfyUI-GGUF's.

    Raises: UnsupportedError: it has been sampled from, and its weights were copied for that.
    """
    addresses = [weight.data_ptr() for weight in _weights(model)]
    if not addresses:
        return None
    for start, stop, path in _mapped_files():
        if any(start <= address < stop for address in addresses):
            return path
    raise UnsupportedError(
        "The GGUF file of this MODEL is not known any more: ComfyUI has copied its weights to sample from it.",
        "Load it with Load Parallel MMDiT or UNet, which list GGUF files, or run its loader anew.",
    )


def _weights(model: ModelPatcher) -> Iterator[Tensor]:
    for weight in model.model.diffusion_model.parameters():
        kind = type(weight)
        if kind.__name__ == "GGMLTensor" and kind.__module__.endswith(".ops") and hasattr(weight, "tensor_type"):
            yield weight


def _mapped_files() -> Iterator[tuple[int, int, Path]]:
    """Where GGUF files lie in this process's memory: first address, one past last, and the file."""
    for line in _MAPS.read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if is_gguf(path := Path(name)):
            start, stop = (int(bound, 16) for bound in span.split("-"))
            yield start, stop, path
