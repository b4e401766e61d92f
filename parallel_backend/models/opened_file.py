"""The tensors of a file or folder of any kind that is opened here."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..checkpoint_files.diffusion_part import diffusion_prefix
from ..checkpoint_files.gguf_file import is_gguf
from ..checkpoint_files.header import CODES, entries_of
from ..checkpoint_files.layout import files_of
from ..checkpoint_files.pickled_file import is_pickled, pickled_tensors
from ..checkpoint_files.safetensors_file import check_stamp, stamp
from ..distributed.tensor_parallel import Shard, cut
from ..errors import UnsupportedError
from .checkpoint import TensorSource
from .gguf_source import GGUFSource
from .packed_source import PackedSource


class PickleSource:
    """The tensors of files that torch saved, below a name prefix; mapped, and read in parts."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        """Raises: CheckpointError: damaged, or a pickle that wants to run code."""
        self.path = path
        self.bytes_read = 0
        self._stamps = {file: stamp(file) for file in files_of(path) if file.is_file()}
        self._tensors = {
            name[len(prefix) :]: tensor
            for file in files_of(path)
            for name, tensor in pickled_tensors(file).items()
            if name.startswith(prefix)
        }

    def check_unchanged(self) -> None:
        for file, opened in self._stamps.items():
            check_stamp(file, opened)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        return None

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        whole = self._tensors[name]
        if whole.dtype not in CODES:
            kind = str(whole.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"{self.path.name} stores {name} as {kind}.", "Use a checkpoint in float32, float16 or bfloat16."
            )
        part = cut(whole, shard)
        self.bytes_read += part.nbytes
        return part


def open_source(path: Path, prefix: str = "") -> TensorSource:
    """Quantised or not. Raises: CheckpointError, UnsupportedError: it can't be read; the message says why."""
    if is_gguf(path):
        return GGUFSource(path, prefix)
    kind = PickleSource if any(map(is_pickled, files_of(path))) else PackedSource
    return kind(path, prefix)


def open_diffusion(path: Path) -> TensorSource:
    """The diffusion model at `path` by its own names, without what stands before them or beside it in the file."""
    return open_source(path, diffusion_prefix(entries_of(path)))
