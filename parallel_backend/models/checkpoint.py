"""Checkpoint files: opened safely, recognised by their header, and read slice by slice.

A `TensorSource` gives tensors by the names of the single-file checkpoints that ComfyUI users have, whatever the
file's own layout is, and counts the bytes that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..checkpoint_files.layout import files_of
from ..checkpoint_files.safetensors_file import check_stamp, safetensors_header, stamp
from ..distributed.mesh import MeshAxis
from ..distributed.tensor_parallel import Shard, ShardedParameter, cut
from ..errors import CancelledError, CheckpointError, UnsupportedError
from ..quantized.weight import QuantizedWeight
from .left_over import first_of
from .shared_reading import readers, sizes_of
from .staging import Place, placing

_READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource(Protocol):
    """Named tensors of which any part can be read."""

    @property
    def path(self) -> Path: ...
    @property
    def bytes_read(self) -> int: ...
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        """That part of the tensor, in the file's dtype; a `QuantizedWeight` where the file has it quantised."""
        ...

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        """About what that part takes where it stays quantised; None where it isn't quantised."""
        ...

    def check_unchanged(self) -> None:
        """Raises: CheckpointError: the file is not the one any more that was opened."""
        ...


class SafetensorsSource:
    """The tensors of one or more safetensors files below a name prefix."""

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path = path
        self.prefix = prefix
        self.bytes_read = 0
        self._file_of: dict[str, Path] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._metadata: dict[str, str] = {}
        for file in files_of(path):
            header = safetensors_header(file)
            self._metadata |= header.pop("__metadata__", None) or {}
            for name, entry in header.items():
                if name.startswith(prefix):
                    self._file_of[name[len(prefix) :]] = file
                    self._entries[name[len(prefix) :]] = entry
        self._open: dict[Path, Any] = {}
        self._stamps = {file: stamp(file) for file in files_of(path)}

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        kind = self._entries[name]["dtype"]
        if kind not in _READABLE:
            raise UnsupportedError(
                f"{self.path.name} stores {name} as {kind}.", "Use a checkpoint in float32, float16 or bfloat16."
            )
        return _READABLE[kind]

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        return None

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        self.dtype(name)
        return self._stored(name, shard)

    def number(self, name: str) -> float:
        """The value of a tensor that has one, whatever its dtype."""
        return float(self._stored(name).reshape(()))

    def _stored(self, name: str, shard: Shard | None = None) -> Tensor:
        """That part of what the file has under the name, whatever it means."""
        try:
            opened = self._handle(self._file_of[name])
            view = opened.get_slice(self.prefix + name)
            if shard is None:
                parts = [view[:] if view.get_shape() else view[...]]
            else:
                index = (slice(None),) * shard.dim
                parts = [view[(*index, slice(start, stop))] for start, stop in shard.ranges]
        except SafetensorError as error:
            raise CheckpointError(
                f"{name} can't be read from {self.path.name}: {error}.", "Download it again."
            ) from None
        self.bytes_read += sum(part.numel() * part.element_size() for part in parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, shard.dim if shard else 0)

    def check_unchanged(self) -> None:
        for file, opened in self._stamps.items():
            check_stamp(file, opened)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a tensor of the file; stop None is its end."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass
class SourceOver:
    """Gives another source's tensors in its own way; the file is that one's."""

    inner: TensorSource

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def bytes_read(self) -> int:
        return self.inner.bytes_read

    def check_unchanged(self) -> None:
        self.inner.check_unchanged()


@dataclass
class RenamedSource(SourceOver):
    """Another file layout under the single-file names: each tensor is pieces of the file's, joined along dim 0."""

    pieces: Mapping[str, Sequence[Piece]]

    def names(self) -> list[str]:
        return list(self.pieces)

    def _rows(self, piece: Piece) -> tuple[int, int]:
        return piece.start, piece.stop if piece.stop is not None else self.inner.shape(piece.name)[0]

    def held_bytes(self, name: str, shard: Shard | None) -> int | None:
        """Of those of its pieces that stay quantised; the others count as half precision."""
        pieces = self.pieces[name]
        if all(self.inner.held_bytes(piece.name, None) is None for piece in pieces):
            return None
        whole = sum(self._bytes_of(piece) for piece in pieces)
        return whole if shard is None else round(whole * shard.size / self.shape(name)[shard.dim])

    def _bytes_of(self, piece: Piece) -> int:
        rows = Shard(0, (self._rows(piece),))
        quantised = self.inner.held_bytes(piece.name, rows)
        return quantised if quantised is not None else 2 * rows.size * prod(self.inner.shape(piece.name)[1:])

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = self.pieces[name]
        rows = sum(stop - start for start, stop in map(self._rows, pieces))
        tail = self.inner.shape(pieces[0].name)[1:]
        return (rows, *tail)

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        pieces = self.pieces[name]
        if shard is not None and shard.dim == 0:
            return torch.cat([part for wanted in shard.ranges for part in self._read_rows(pieces, *wanted)])
        if len(pieces) == 1 and self._is_whole(pieces[0]):
            return self.inner.read(pieces[0].name, shard)
        if shard is not None and all(self._is_whole(piece) for piece in pieces):
            return torch.cat([self.inner.read(piece.name, shard) for piece in pieces])
        return cut(torch.cat(list(self._read_rows(pieces, 0, self.shape(name)[0]))), shard)

    def _is_whole(self, piece: Piece) -> bool:
        return self._rows(piece) == (0, self.inner.shape(piece.name)[0])

    def _read_rows(self, pieces: Sequence[Piece], start: int, stop: int) -> Iterable[Tensor]:
        offset = 0
        for piece in pieces:
            first, last = self._rows(piece)
            a, b = max(start, offset), min(stop, offset + last - first)
            if a < b:
                yield self.inner.read(piece.name, Shard(0, ((first + a - offset, first + b - offset),)))
            offset += last - first


@dataclass(frozen=True)
class HeldWeight:
    """A parameter with its values, and which part it is of the tensor of its name; `shard` None is all of it."""

    parameter: nn.Parameter
    full_shape: tuple[int, ...]
    shard: Shard | None

    @property
    def columns(self) -> Tensor | slice:
        """Those of the full matrix that it has."""
        if self.shard is None or self.shard.dim == 0:
            return slice(None)
        assert self.shard.dim == 1 and len(self.full_shape) == 2
        return torch.cat([torch.arange(*kept, device=self.parameter.device) for kept in self.shard.ranges])

    def rows_of(self, first: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Where it has some of the full tensor's rows `first` to `first + count`: among its own, and among these."""
        rows = self.shard.ranges if self.shard is not None and self.shard.dim == 0 else ((0, self.full_shape[0]),)
        own = 0
        for start, stop in rows:
            a, b = max(start, first), min(stop, first + count)
            if a < b:
                yield slice(own + a - start, own + b - start), slice(a - first, b - first)
            own += stop - start


def load_parameters(
    model: nn.Module,
    source: TensorSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    unread: frozenset[str] = frozenset(),
    should_stop: Callable[[], bool] = lambda: False,
    shared: MeshAxis | None = None,
    told: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, HeldWeight]:
    """Every parameter of `model` holds this rank's part of the tensor of its name, on `device` in `dtype`.

    Args:
        unread: names that the file must have and that this rank doesn't read now.
        should_stop: asked before each tensor.
        shared: ranks that hold the same parts. This one reads its share of them; the others have room, and are filled by
            `pass_on`.
        told: after each tensor that was read, the bytes that `bytes_held` counts for it.
    Returns: by name what is held.
    Raises:
        CheckpointError: names missing from the file, or a tensor of another shape.
        CancelledError: `should_stop` said so.
    """
    wanted = dict(model.named_parameters())
    check_names(set(wanted) | unread, set(source.names()), source.path.name)
    for name, parameter in wanted.items():
        full_shape = parameter.full_shape if isinstance(parameter, ShardedParameter) else tuple(parameter.shape)
        if source.shape(name) != full_shape:
            raise CheckpointError(
                f"{source.path.name}: {name} has shape {list(source.shape(name))}, the model needs {list(full_shape)}.",
                "The file is damaged, or of a model that this version doesn't know.",
            )
    place = placing(device)
    read_by = readers(sizes_of(model), shared.degree) if shared is not None else {}
    held = {}
    for name, parameter in wanted.items():
        if should_stop():
            raise CancelledError(f"Loading {source.path.name} was cancelled.")
        shard, kept_dtype = None, dtype
        if isinstance(parameter, ShardedParameter):
            shard, kept_dtype = parameter.shard, torch.float32 if parameter.fp32 else dtype
        if shared is not None and read_by[name] != shared.rank:
            tensor = torch.empty(parameter.shape, dtype=kept_dtype, device=device)
        else:
            tensor = _placed(source.read(name, shard), kept_dtype, place)
            told(_bytes_of(name, parameter, source, dtype))
        module, _, leaf = name.rpartition(".")
        loaded: Any = tensor if isinstance(tensor, QuantizedWeight) else nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(module), leaf, loaded)
        held[name] = HeldWeight(loaded, source.shape(name), shard)
    return held


def _placed(tensor: Tensor, dtype: torch.dtype, place: Place) -> Tensor:
    """On its device, still quantised; a vector's few values are not worth that."""
    if not isinstance(tensor, QuantizedWeight):
        return place(tensor, dtype)
    moved = tensor.placed(place, dtype)
    return moved if tensor.ndim > 1 else moved.dequantized()


def is_quantised(source: TensorSource) -> bool:
    """Whether any of its tensors stays so."""
    return any(source.held_bytes(name, None) is not None for name in source.names())


def bytes_held(model: nn.Module, source: TensorSource, dtype: torch.dtype) -> int:
    """About what this rank's parameters take."""
    return sum(_bytes_of(name, parameter, source, dtype) for name, parameter in model.named_parameters())


def _bytes_of(name: str, parameter: nn.Parameter, source: TensorSource, dtype: torch.dtype) -> int:
    shard = parameter.shard if isinstance(parameter, ShardedParameter) else None
    quantised = source.held_bytes(name, shard) if parameter.ndim > 1 else None
    return parameter.numel() * dtype.itemsize if quantised is None else quantised


def check_names(wanted: set[str], found: set[str], file_name: str) -> None:
    """Raises CheckpointError that names what is missing from the file, and what is left over in it beside that."""
    missing, left_over = sorted(wanted - found), sorted(found - wanted)
    if missing:
        parts = [
            f"{len(names)} {what}: {first_of(names)}"
            for what, names in (("missing", missing), ("left over", left_over))
            if names
        ]
        raise CheckpointError(
            f"{file_name} doesn't fit the model that its header describes ({'; '.join(parts)}).",
            "The file is damaged, or of a model that this version doesn't know.",
        )
