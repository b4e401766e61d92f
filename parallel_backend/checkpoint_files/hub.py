"""A model by its name on the Hugging Face hub, where it has been downloaded: nothing is fetched."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError

_NAME = re.compile(r"[a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*")
# Of files that hold weights; the names of hubs' models may have dots too.
SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".pkl")
# Of the pipelines that are drawn with; a model's card and its demo pictures are of no use.
_WANTED = ("*.json", "*.txt", "*.model", "*.safetensors")


def local_path(path: Path) -> Path:
    """The path itself where it exists or can't be a hub's name; else the folder in the hub's cache of the model so named.

    Raises: CheckpointError: it is neither here nor in the cache.
    """
    name = path.as_posix()
    if path.exists() or not _NAME.fullmatch(name) or path.suffix.lower() in SUFFIXES:
        return path
    if (folder := cached(name)) is None:
        raise CheckpointError(
            f"There is neither a file {name} here nor a model {name} in the Hugging Face hub's cache.",
            f"Give the file's path, or download the model once: {download(name, _WANTED)}",
        )
    return folder


def download(name: str, patterns: Sequence[str]) -> str:
    """The command that fetches these files of a hub's model."""
    return shlex.join(["hf", "download", name, *(word for pattern in patterns for word in ("--include", pattern))])


def cached(name: str) -> Path | None:
    """The folder of a hub's model, `owner/name`; None where it has not been downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
