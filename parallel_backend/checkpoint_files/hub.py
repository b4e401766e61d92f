"""A model by its name on the Hugging Face hub, where it has been downloaded: nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Of the pipelines that are drawn with; a model's card and its demo pictures are of no use.
_WANTED = "--include '*.json' '*.txt' '*.model' '*.safetensors'"


def local_path(path: Path) -> Path:
    """The path itself where it exists or can't be a hub's name; else the folder in the hub's cache of the model so named.

    Raises: CheckpointError: it is neither here nor in the cache.
    """
    name = path.as_posix()
    if path.exists() or not _NAME.fullmatch(name) or path.suffix in (".safetensors", ".gguf", ".pkl"):
        return path
    if (folder := cached(name)) is None:
        raise CheckpointError(
            f"There is neither a file {name} here nor a model {name} in the Hugging Face hub's cache.",
            f"Give the file's path, or download the model once: hf download {name} {_WANTED}",
        )
    return folder


def cached(name: str) -> Path | None:
    """The folder of a hub's model, `owner/name`; None where it has not been downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
