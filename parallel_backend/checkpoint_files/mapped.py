"""The tensors of a checkpoint, mapped: pages are read as they are used, and none is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .header import file_entries
from .layout import files_of
from .pickled_file import is_pickled, pickled_tensors
from .safetensors_file import check_stamp, stamp


class MappedTensors(Mapping[str, Tensor]):
    """Those of all files of the model at `path`, by the files' own names."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError: a file that can't be read."""
        files = files_of(path)
        self._file_of = {name: file for file in files for name in file_entries(file)}
        self._stamps = {file: stamp(file) for file in files}
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Raises: CheckpointError: the file is not the one any more that it was."""
        file = self._file_of[name]
        check_stamp(file, self._stamps[file])
        if file not in self._open:
            self._open[file] = (
                pickled_tensors(file) if is_pickled(file) else safe_open(file, framework="pt", device="cpu")
            )
        opened = self._open[file]
        tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)
