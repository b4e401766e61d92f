"""Safetensors files from outside: is it one, is it whole, has it changed. Reads headers, never weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CheckpointError

_SAMPLES = 256
_SAMPLE_BYTES = 4096
# Files that torch's weights-only reader opens: only from-scratch SD3 models come so.
PICKLED = (".pkl",)
_OTHER_HEADERS = (*PICKLED, ".gguf")
Stamp: TypeAlias = tuple[int, int, int]


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, checked against the file's length.

    Raises: CheckpointError: not a file, not safetensors (a pickle, say), or cut short.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file at {path}.", "Check the name, and that the backend sees this disk.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
            raise CheckpointError(_not_safetensors(path, head), "Use the .safetensors file of this model.")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(_not_safetensors(path, head), "Use the .safetensors file of this model.") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path.name} has {size} bytes where its header promises {expected}: it is cut short or damaged.",
            "Download or copy it again.",
        )
    return header


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


def content_key(path: Path, *, timed: bool = True) -> str:
    """A key that changes when the weights at `path` do: header, size, samples of the data and, if `timed`, time of change.

    Copies on several hosts have different times.

    Reads at most 1 MiB and the header of each file, whatever the checkpoint's size.
    """
    digest = hashlib.sha256()
    for file in files_of(path):
        if file.suffix not in _OTHER_HEADERS:
            safetensors_header(file)
        stat = file.stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns if timed else 0}".encode())
        with file.open("rb") as opened:
            if file.suffix not in _OTHER_HEADERS:
                digest.update(opened.read(8 + int.from_bytes(opened.read(8), "little")))
            for sample in range(_SAMPLES):
                opened.seek(stat.st_size * sample // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def model_folder(path: Path) -> Path:
    """The folder that holds the weights: a diffusers pipeline keeps them in `transformer`."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def files_of(path: Path) -> list[Path]:
    """The safetensors files at `path`: itself, or all of the folder.

    Raises: CheckpointError: a folder without any.
    """
    path = model_folder(path)
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"The folder {path} holds no .safetensors file.", "Name the model's own folder.")
    return files
