"""The values of GGUF tensors: those that are not quantised, and all of one that is."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..checkpoint_files.gguf_file import PLAIN, GGUFTensor, gguf_package
from .forms import GGUF, is_known


def stored(tensor: GGUFTensor) -> Tensor:
    """What the file has, mapped: values, or bytes of a quantised type."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(tensor.data)


def plain_values(tensor: GGUFTensor) -> Tensor:
    """Mapped, of a tensor that is not quantised."""
    data = stored(tensor)
    return (data.view(torch.bfloat16) if tensor.kind == "BF16" else data).view(tensor.shape)


def dequantized(tensor: GGUFTensor) -> Tensor:
    """fp32, by the gguf package on the CPU, which knows all types."""
    gguf = gguf_package()
    values = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.kind])
    return torch.from_numpy(values).view(tensor.shape)


def values_of(tensor: GGUFTensor) -> Tensor:
    """Of any tensor, as ranks compute with them: mapped where they are not quantised."""
    if tensor.kind in PLAIN:
        return plain_values(tensor)
    if not is_known(tensor.kind):
        return dequantized(tensor)
    data = stored(tensor)
    return GGUF(tensor.kind).values([data.reshape(-1, data.shape[-1])], torch.float32).view(tensor.shape)
