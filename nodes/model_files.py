"""Files of ComfyUI's model folders, as the loaders list and find them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..parallel_backend.errors import CheckpointError

CHECKPOINTS = "checkpoints/"
TAESD_NAMES = ("taesd3", "taesdxl")


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
    """Files that may hold a VAE, and the TAESD families whose encoder and decoder are in vae_approx."""
    return [*names_in("vae"), *(name for name in TAESD_NAMES if None not in _taesd_files(name))]


def vae_paths(name: str) -> list[Path]:
    """One file, or TAESD's encoder and decoder.

    Raises: CheckpointError: not in the model folders.
    """
    if name not in TAESD_NAMES:
        return [path_of(name, "vae")]
    paths = [Path(path) for path in _taesd_files(name) if path is not None]
    if len(paths) < 2:
        raise CheckpointError(
            f"{name} needs {name}_encoder.safetensors and {name}_decoder.safetensors.", "Put both in vae_approx."
        )
    return paths


def file_fingerprint(path: Path) -> str:
    """Changes when the file does, so that the node runs again."""
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"


def _taesd_files(name: str) -> list[str | None]:
    return [folder_paths.get_full_path("vae_approx", f"{name}_{part}.safetensors") for part in ("encoder", "decoder")]
