"""Safetensors files from outside: is it one, is it whole, has it changed. Reads headers, never weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CheckpointError

Stamp: TypeAlias = tuple[int, int, int]


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's length.

    Raises: CheckpointError: not a file, not safetensors (a pickle, say), or cut short.
    """
    check_there(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(_not_safetensors(path, head), "Use the .safetensors file of this model.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(_not_safetensors(path, head), "Use the .safetensors file of this model.") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path.name} has {size} bytes where its header promises {expected}: it is cut short or damaged.",
            "Download or copy it again.",
        )
    return header


def _end(entry: Mapping[str, Any]) -> int:
    """Where a tensor's bytes end. Raises: ValueError, KeyError, TypeError: the entry is none of a tensor."""
    start, stop = entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or not all(isinstance(s, int) and s >= 0 for s in entry["shape"]):
        raise ValueError(entry)
    if not 0 <= start <= stop:
        raise ValueError(entry)
    return int(stop)


def tensor_bytes(path: Path, entry: Mapping[str, Any]) -> bytes:
    """Those of a tensor with that entry in the file's header."""
    start, stop = entry["data_offsets"]
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length + start)
        return file.read(stop - start)


def _not_safetensors(path: Path, head: bytes) -> str:
    pickled = head[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    kind = "a pickle (a .ckpt or .pt file under another name), which can run code when opened" if pickled else "not one"
    return f"{path.name} should be a safetensors file, but it is {kind}."


def check_there(path: Path) -> None:
    """Raises: CheckpointError: there is no such file."""
    if not path.is_file():
        raise CheckpointError(f"There is no file at {path}.", "Check the name, and that the backend sees this disk.")


def stamp(file: Path) -> Stamp:
    """What changes when the file is replaced or written to."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_stamp(file: Path, opened: Stamp) -> None:
    """Raises: CheckpointError: the file is not the one any more that was opened."""
    if not file.is_file():
        raise CheckpointError(f"{file} is not there (any more).", "Put it back, or load another.")
    if stamp(file) != opened:
        raise CheckpointError(
            f"{file.name} has changed since it was loaded, and its weights are needed again.",
            "Load it again: in ComfyUI, free the models and node cache, then queue the prompt again.",
        )
