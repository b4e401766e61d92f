"""The values of a file's tensors, each whole, quantised or not: for those who compute with few of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint_files.gguf_file import PLAIN, SUFFIX, GGUFTensor, gguf_package, gguf_tensors
from ..checkpoint_files.packed_entries import PackedEntry, packed_entries
from .forms import GGUF, form_of, is_known


class WholeFile(Mapping[str, Tensor]):
    """Those below a prefix, by the file's names without it. What is not quantised is mapped; pages are read as they are used, and none is kept.

    Raises: CheckpointError, UnsupportedError: as `packed_entries` and `gguf_tensors`.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._prefix = prefix
        self._opened: Any = None
        self._packed: dict[str, PackedEntry] = {}
        if path.suffix == SUFFIX:
            self._tensors: dict[str, Any] = {
                name[len(prefix) :]: tensor for name, tensor in gguf_tensors(path).items() if name.startswith(prefix)
            }
            self.is_quantised = any(tensor.kind not in PLAIN for tensor in self._tensors.values())
        else:
            self._tensors, self._packed = packed_entries(path, prefix)
            self._opened = safe_open(path, framework="pt", device="cpu")
            self.is_quantised = bool(self._packed)

    def __getitem__(self, name: str) -> Tensor:
        if self._opened is None:
            return _values(self._tensors[name])
        entry = self._packed.get(name)
        if entry is None:
            return self._opened.get_tensor(self._prefix + name)
        parts = [self._opened.get_tensor(self._prefix + part) for part in entry.parts]
        return form_of(entry.form, entry.options).values(parts, torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _values(tensor: GGUFTensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        data = torch.from_numpy(tensor.data)
    if tensor.kind in PLAIN:
        return (data.view(torch.bfloat16) if tensor.kind == "BF16" else data).view(tensor.shape)
    if is_known(tensor.kind):
        return GGUF(tensor.kind).values([data.reshape(-1, data.shape[-1])], torch.float32).view(tensor.shape)
    gguf = gguf_package()
    values = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.kind])
    return torch.from_numpy(values).view(tensor.shape)
