"""Keys that tell one checkpoint's content from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .gguf_file import is_gguf
from .layout import files_of
from .pickled_file import is_pickled
from .safetensors_file import check_there, safetensors_header

_SAMPLES = 256
_SAMPLE_BYTES = 4096


def content_key(path: Path, *, timed: bool = True) -> str:
    """A key that changes when the weights at `path` do: header, size, samples of the data and, if `timed`, time of change.

    Copies on several hosts have different times.

    Reads at most 1 MiB and the header of each file, whatever the checkpoint's size.
    Raises: CheckpointError: no such file, or not a safetensors file where its name doesn't say another kind.
    """
    digest = hashlib.sha256()
    for file in files_of(path):
        check_there(file)
        has_header = not is_pickled(file) and not is_gguf(file)
        if has_header:
            safetensors_header(file)
        stat = file.stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns if timed else 0}".encode())
        with file.open("rb") as opened:
            if has_header:
                digest.update(opened.read(8 + int.from_bytes(opened.read(8), "little")))
            for sample in range(_SAMPLES):
                opened.seek(stat.st_size * sample // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
