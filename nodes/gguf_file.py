"""The file of a MODEL that ComfyUI-GGUF loaded. Its loader leaves no name, but its weights are that file, mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..parallel_backend.checkpoint_files.gguf_file import SUFFIX
from ..parallel_backend.errors import UnsupportedError

_MAPS = Path("/proc/self/maps")


def gguf_file(model: ModelPatcher) -> Path | None:
    """None where it is no MODEL of ComfyUI-GGUF's.

    Raises: UnsupportedError: it has been sampled from, and its weights were copied for that.
    """
    weights = list(_weights(model))
    if not weights:
        return None
    for weight in weights:
        path = _mapped_at(weight.data_ptr())
        if path is not None and path.suffix == SUFFIX:
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


def _mapped_at(address: int) -> Path | None:
    for line in _MAPS.read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in span.split("-"))
        if start <= address < stop:
            return Path(name) if name.startswith("/") else None
    return None
