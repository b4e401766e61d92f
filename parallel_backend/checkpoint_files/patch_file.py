"""Files of patches on a model's weights, which a client writes and ranks read their parts of.

A safetensors file whose metadata lists its entries: the weight that each is for, the weight's first row that it concerns, and a
digest of its content. Entry 3 has the tensors `3.up` and `3.down`, whose product is added, or `3`, which takes the weight's place.
Its name is made of its content and of the process that wrote it, so it never changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors_file import safetensors_header

UP, DOWN = ".up", ".down"
_ENTRIES = "entries"
_DIGEST_BYTES = 16
_NAME = re.compile(r"(\d+)-[0-9a-f]{32}\.(safetensors|unfinished)")
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class PatchEntry:
    """What lies in a file for a weight of this name; `row` is the weight's first that it concerns."""

    weight: str
    row: int
    digest: str


@dataclass(frozen=True)
class LowRank:
    """up @ down is added to the weight, from its row `row` on. Kernels count as matrices: all dims after the first are one.

    Args:
        up: (rows, rank, ...). down: (rank, columns, ...).
    """

    weight: str
    up: Tensor
    down: Tensor
    row: int = 0


@dataclass(frozen=True)
class Whole:
    """What `make` gives, of that shape and dtype, takes the place of the weight."""

    weight: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def is_patch_file(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[2] == "safetensors"


def writer_of(name: str) -> int | None:
    """The process that wrote the patch file of that name, or began to; None of another file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match is not None else None


def write_low_rank(folder: Path, patches: Sequence[LowRank]) -> str:
    """The name of the file in `folder` that holds them; written where it isn't there already."""
    tensors = [(_storable(patch.up), _storable(patch.down)) for patch in patches]
    entries = [PatchEntry(p.weight, p.row, _digest(p, pair)) for p, pair in zip(patches, tensors, strict=True)]
    name = _name(entries)
    if not (folder / name).is_file():
        named = {f"{i}{part}": t for i, pair in enumerate(tensors) for part, t in zip((UP, DOWN), pair, strict=True)}
        shapes = {key: (tuple(t.shape), t.dtype) for key, t in named.items()}
        _write(folder, shapes, iter(named.values()), lambda: entries)
    return name


def write_whole(folder: Path, patches: Sequence[Whole]) -> str:
    """The name of the file in `folder` that holds them, each made and written one after the other."""
    entries: list[PatchEntry] = []

    def made() -> Iterator[Tensor]:
        for patch in patches:
            tensor = patch.make().detach().to("cpu", patch.dtype).contiguous()
            if tuple(tensor.shape) != patch.shape:
                raise CheckpointError(
                    f"The patched {patch.weight} has shape {list(tensor.shape)}, the model's {list(patch.shape)}.",
                    "A patch that changes a weight's shape can't be used here: remove its node.",
                )
            entries.append(PatchEntry(patch.weight, 0, _digest(patch, [tensor])))
            yield tensor

    shapes = {str(i): (patch.shape, patch.dtype) for i, patch in enumerate(patches)}
    blank = [PatchEntry(patch.weight, 0, "0" * 2 * _DIGEST_BYTES) for patch in patches]
    return _write(folder, shapes, made(), lambda: entries or blank)


def append_part(path: Path, part: int, data: Tensor, *, last: bool) -> None:
    """Part after part, bytes (uint8) of a file that has its name once the last is there.

    Raises: CheckpointError: it can't be written.
    """
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with unfinished.open("ab" if part else "wb") as file:
            file.write(_bytes(data))
        if last:
            unfinished.rename(path)
    except OSError as error:
        raise _cannot_write(path.parent, error) from None


def entries_of(path: Path) -> list[PatchEntry]:
    """Raises: CheckpointError: not such a file, or not whole."""
    metadata = safetensors_header(path).get("__metadata__", {})
    try:
        return [PatchEntry(*entry) for entry in json.loads(metadata[_ENTRIES])]
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{path.name} holds no patches.", "Run the prompt again.") from None


def _write(
    folder: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterator[Tensor],
    entries: Callable[[], Sequence[PatchEntry]],
) -> str:
    """Writes the tensors one after the other, and the header, whose digests are known only then, over its first form."""
    unfinished = folder / f"{os.getpid()}-{uuid.uuid4().hex}.unfinished"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(_header(shapes, entries()))
            for tensor in tensors:
                file.write(_bytes(tensor))
            file.seek(0)
            file.write(_header(shapes, entries()))
        name = _name(entries())
        unfinished.rename(folder / name)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return name


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Patched weights can't be written to {folder}: {error.strerror}.",
        "Make room there, or set PARALLEL_MMDIT_RUNTIME_DIR to a folder with more.",
    )


def _header(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], entries: Sequence[PatchEntry]) -> bytes:
    """Equally long whatever the digests are."""
    listed = json.dumps([[entry.weight, entry.row, entry.digest] for entry in entries])
    header: dict[str, object] = {"__metadata__": {_ENTRIES: listed}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _storable(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", tensor.dtype if tensor.dtype in _DTYPES else torch.float32).contiguous()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(patch: LowRank | Whole, tensors: Sequence[Tensor]) -> str:
    row = patch.row if isinstance(patch, LowRank) else 0
    digest = hashlib.blake2b(f"{patch.weight} {row}".encode(), digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        digest.update(f" {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _name(entries: Sequence[PatchEntry]) -> str:
    digest = hashlib.blake2b(" ".join(entry.digest for entry in entries).encode(), digest_size=_DIGEST_BYTES)
    return f"{os.getpid()}-{digest.hexdigest()}.safetensors"
