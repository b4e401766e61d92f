"""Files of ComfyUI's model folders and of the demo, as the loaders list and find them.

The demo's are this pack's alone: ComfyUI's own lists don't have them, so that its own graphs never choose them.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import folder_paths

from ..parallel_backend.checkpoint_files.gguf_file import SUFFIX
from ..parallel_backend.checkpoint_files.taesd_files import DECODER, ENCODER, FAMILIES
from ..parallel_backend.demo.files import FILES, OWN, DemoFile, present
from ..parallel_backend.errors import CheckpointError
from .node_text import say

CHECKPOINTS = "checkpoints/"
# ComfyUI's lists are of a folder and suffixes, under a name.
_GGUF = "parallel_mmdit_gguf"


def names_in(folder: str, demo: DemoFile | None = None) -> list[str]:
    """Files of the folder, those of the checkpoints folder with that folder's name before them, and the demo's, if any."""
    own = [*folder_paths.get_filename_list(folder), *_gguf_names(folder)]
    checkpoints = [CHECKPOINTS + name for name in folder_paths.get_filename_list("checkpoints")]
    return [*own, *checkpoints, *([demo.listed] if demo and demo.listed not in own else [])]


def _gguf_names(folder: str) -> list[str]:
    """GGUF files of the models' folder, which ComfyUI doesn't list."""
    if folder != "diffusion_models":
        return []
    folder_paths.folder_names_and_paths[_GGUF] = (folder_paths.get_folder_paths(folder), {SUFFIX})
    return folder_paths.get_filename_list(_GGUF)


def path_of(name: str, folder: str) -> Path:
    """The file of a name that `names_in` gave; the demo's is fetched if it has to be.

    Raises: CheckpointError: no such file in the model folders, or the demo's could not be fetched.
    """
    found = _find(name, folder)
    return present(found, fetching) if isinstance(found, DemoFile) else found


def vae_names() -> list[str]:
    """Files that may hold a VAE, and TAESD's encoder and decoder pairs of vae_approx, in any folder there, and the demo's."""
    approx = set(folder_paths.get_filename_list("vae_approx"))
    pairs = [name.removesuffix(ENCODER) for name in sorted(approx) if name.endswith(ENCODER)]
    found = [name for name in pairs if _is_taesd(name) and name + DECODER in approx]
    return [*names_in("vae"), *dict.fromkeys([*found, *(f"{OWN}/{family}" for family in FAMILIES.values())])]


def vae_paths(name: str) -> list[Path]:
    """One file, or TAESD's encoder and decoder; the demo's are fetched if they have to be.

    Raises: CheckpointError: as `path_of`.
    """
    return [path_of(file, folder) for file, folder in _vae_files(name)]


def _vae_files(name: str) -> list[tuple[str, str]]:
    """Names and their folders."""
    if _is_taesd(name):
        return [(name + part, "vae_approx") for part in (ENCODER, DECODER)]
    return [(name, "vae")]


def _find(name: str, folder: str) -> Path | DemoFile:
    """A file of the user's own goes before one of the demo's."""
    if name.startswith(CHECKPOINTS):
        folder, name = "checkpoints", name.removeprefix(CHECKPOINTS)
    path = folder_paths.get_full_path(folder, name)
    if path is not None:
        return Path(path)
    for demo in FILES.values():
        if (demo.listed, demo.folder) == (name, folder):
            return demo
    raise CheckpointError(f"There is no {name!r} in ComfyUI's {folder} folder.", "Put it there, or choose another.")


def fetching(file: DemoFile, done: int) -> None:
    """Shows on the executing node what has come of the demo's file; an interrupt in ComfyUI ends the fetch."""
    mm.throw_exception_if_processing_interrupted()
    say(f"fetching {file.name}: {done / 2**20:.0f} of {file.size / 2**20:.0f} MiB from {file.url}")


def name_elsewhere(path: Path) -> str:
    """As `names_elsewhere`, of a file that one of ComfyUI's loaders found; its own name where no model folder has it."""
    folders = [
        Path(f) for kind in ("checkpoints", "diffusion_models", "vae") for f in folder_paths.get_folder_paths(kind)
    ]
    inside = (path.relative_to(folder) for folder in folders if path.is_relative_to(folder))
    return next(inside, Path(path.name)).as_posix()


def names_elsewhere(name: str) -> list[str]:
    """How another machine's backend finds the files of a name, below its own model folders."""
    return [name + part for part in (ENCODER, DECODER)] if _is_taesd(name) else [name.removeprefix(CHECKPOINTS)]


def _is_taesd(name: str) -> bool:
    return name.rpartition("/")[2] in FAMILIES.values()


def fingerprint(name: str, folder: str) -> str:
    """As `file_fingerprint`, of a name that `names_in` gave; fetches nothing.

    Raises: CheckpointError: no such file in the model folders.
    """
    found = _find(name, folder)
    if isinstance(found, DemoFile):
        return file_fingerprint(found.shipped) if found.shipped.is_file() else found.sha256
    return file_fingerprint(found)


def vae_fingerprint(name: str) -> str:
    """As `fingerprint`, of one file or of TAESD's two."""
    return " ".join(fingerprint(file, folder) for file, folder in _vae_files(name))


def file_fingerprint(path: Path) -> str:
    """Changes when the file does, so that the node runs again."""
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"
