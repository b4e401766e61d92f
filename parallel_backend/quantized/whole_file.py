"""The values of a file's tensors, each whole, quantised or not: for those who compute with few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_files.bitsandbytes_entries import FOUR_BITS
from ..checkpoint_files.gguf_file import PLAIN, gguf_tensors, is_gguf
from ..checkpoint_files.mapped import MappedTensors
from ..checkpoint_files.packed_entries import PackedEntry, has_packing, packed_entries
from .bitsandbytes import bitsandbytes_part
from .forms import form_of
from .gguf_values import values_of


class WholeFile(Mapping[str, Tensor]):
    """Those below a prefix, by the file's names without it. What is not quantised is mapped; pages are read as they are used, and none is kept.

    Raises: CheckpointError, UnsupportedError: as `packed_entries` and `gguf_tensors`.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._packed: dict[str, PackedEntry] = {}
        self._mapped: MappedTensors | None = None
        self._prefix = prefix
        if is_gguf(path):
            found = gguf_tensors(path).items()
            self._tensors: dict[str, Any] = {n[len(prefix) :]: tensor for n, tensor in found if n.startswith(prefix)}
            self.is_quantised = any(tensor.kind not in PLAIN for tensor in self._tensors.values())
            return
        self._mapped = MappedTensors(path)
        if has_packing(path):
            self._tensors, self._packed = packed_entries(path, prefix)
        else:
            self._tensors = {n[len(prefix) :]: None for n in self._mapped if n.startswith(prefix)}
        self.is_quantised = bool(self._packed)

    def __getitem__(self, name: str) -> Tensor:
        """Raises: CheckpointError: the file is not the one any more that it was."""
        if self._mapped is None:
            return values_of(self._tensors[name])
        if name not in self._packed:
            return self._mapped[self._prefix + name]
        entry, mapped = self._packed[name], self._mapped
        if entry.form in FOUR_BITS:
            rows, columns = ((0, side) for side in entry.shape)
            part = bitsandbytes_part(entry, rows, columns, lambda n, start, stop: mapped[self._prefix + n][start:stop])
            return part.values(torch.float32)
        parts = [mapped[self._prefix + part] for part in entry.parts]
        return form_of(entry.form, entry.options).values(parts, torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
