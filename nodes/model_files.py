"""Files of ComfyUI's model folders, as the loaders list and find them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..parallel_backend.checkpoint_files.taesd_files import DECODER, ENCODER, FAMILIES
from ..parallel_backend.errors import CheckpointError

CHECKPOINTS = "checkpoints/"


def names_in(folder: str) -> list[str]:
    """Files of the folder, then those of the checkpoints folder with that folder's name before them."""
    checkpoints = (CHECKPOINTS + name for name in folder_paths.get_filename_list("checkpoints"))
    return [*folder_paths.get_filename_list(folder), *checkpoints]


def path_of(name: str, folder: str) -> Path:
    """The file of a name that `names_in` gave.

    Raises: CheckpointError: no such file in the model folders.
    """
    if name.startswith(CHECKPOINTS):
        folder, name = "checkpoints", name.removeprefix(CHECKPOINTS)
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise CheckpointError(f"There is no {name!r} in ComfyUI's {folder} folder.", "Put it there, or choose another.")
    return Path(path)


def vae_names() -> list[str]:
    """Files that may hold a VAE, and TAESD's encoder and decoder pairs of vae_approx, in any folder there."""
    approx = set(folder_paths.get_filename_list("vae_approx"))
    pairs = sorted(name.removesuffix(ENCODER) for name in approx if name.endswith(ENCODER))
    return [*names_in("vae"), *(name for name in pairs if _is_taesd(name) and name + DECODER in approx)]


def vae_paths(name: str) -> list[Path]:
    """One file, or TAESD's encoder and decoder.

    Raises: CheckpointError: not in the model folders.
    """
    if not _is_taesd(name):
        return [path_of(name, "vae")]
    found = [folder_paths.get_full_path("vae_approx", name + part) for part in (ENCODER, DECODER)]
    paths = [Path(path) for path in found if path is not None]
    if len(paths) < 2:
        raise CheckpointError(f"{name} needs {name}{ENCODER} and {name}{DECODER}.", "Put both in vae_approx.")
    return paths


def names_elsewhere(name: str) -> list[str]:
    """How another machine's backend finds the files of a name, below its own model folders."""
    return [name + part for part in (ENCODER, DECODER)] if _is_taesd(name) else [name.removeprefix(CHECKPOINTS)]


def _is_taesd(name: str) -> bool:
    return name.rpartition("/")[2] in FAMILIES.values()


def file_fingerprint(path: Path) -> str:
    """Changes when the file does, so that the node runs again."""
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"
