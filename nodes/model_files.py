"""Files of ComfyUI's model folders and of the demo, as the loaders list and find them.

The demo's are this pack's alone: ComfyUI's own lists don't have them, so that its own graphs never choose them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import comfy.model_management as mm
import folder_paths

from ..parallel_backend.checkpoint_files.gguf_file import SUFFIX
from ..parallel_backend.checkpoint_files.layout import files_of, has_common_name, model_folder, vae_folder
from ..parallel_backend.checkpoint_files.taesd_files import DECODER, ENCODER, FAMILIES
from ..parallel_backend.demo.files import FILES, OWN, DemoFile, demo_of, present
from ..parallel_backend.errors import CheckpointError
from .node_text import say

# Before the names of files of other folders than a loader's own.
CHECKPOINTS, DIFFUSERS = "checkpoints/", "diffusers/"
# ComfyUI's lists are of a folder and suffixes, under a name.
_GGUF = "parallel_mmdit_gguf"
_TAESD = "vae_approx"


def names_in(folder: str, demo: DemoFile | None = None) -> list[str]:
    """Files of the folder, then those of the checkpoints folder and the folders of diffusers' pipelines, with what tells them
    from the first before their names, and the demo's, if any."""
    own = own_names_in(folder)
    others = [CHECKPOINTS + name for name in folder_paths.get_filename_list("checkpoints")]
    others += [DIFFUSERS + name for name in _pipelines()]
    return list(dict.fromkeys([*own, *others, *([demo.listed] if demo else [])]))


def own_names_in(folder: str) -> list[str]:
    """ComfyUI's list of the folder, and of those with models for the ranks its GGUF files, which that lacks."""
    own: list[str] = folder_paths.get_filename_list(folder)
    if folder not in ("diffusion_models", "controlnet"):
        return own
    name = f"{_GGUF}_{folder}"
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(folder), {SUFFIX})
    return [*own, *folder_paths.get_filename_list(name)]


def path_of(name: str, folder: str) -> Path:
    """The file or folder of a name that `names_in` gave, or that a workflow of another machine has; the demo's is fetched if it
    has to be.

    Raises: CheckpointError: no such file in the model folders, or the demo's could not be fetched.
    """
    found = _find(name, folder)
    return present(found, fetching) if isinstance(found, DemoFile) else found


def validity(name: str | None, folder: str) -> bool | str:
    """What ComfyUI is told of a name before it runs a prompt, in place of its own look at the list: whether, or why it isn't found.

    Args:
        name: None where a node is to give it.
    """
    try:
        if name is not None:
            _find(name, folder)
    except CheckpointError as error:
        return str(error)
    return True


def taken_for(name: str, folder: str) -> str:
    """A line that says which file is taken, where none has the name itself; else empty."""
    if _at(name, folder) is not None:
        return ""
    return f"There is no {name}; {listed_elsewhere(name, folder)} is taken, the only file of that name."


def vae_names() -> list[str]:
    """Files that may hold a VAE, and TAESD's encoder and decoder pairs of vae_approx, in any folder there, and the demo's."""
    stems = [name.rpartition(".")[0] for name in folder_paths.get_filename_list(_TAESD)]
    encoder, decoder = (part.rpartition(".")[0] for part in (ENCODER, DECODER))
    pairs = [stem.removesuffix(encoder) for stem in sorted(stems) if stem.endswith(encoder)]
    found = [name for name in pairs if _is_taesd(name) and name + decoder in stems]
    return [*names_in("vae"), *dict.fromkeys([*found, *(f"{OWN}/{family}" for family in FAMILIES.values())])]


def vae_paths(name: str) -> list[Path]:
    """One file or folder, or TAESD's encoder and decoder; the demo's are fetched if they have to be.

    Raises: CheckpointError: as `path_of`.
    """
    return [vae_folder(path_of(file, folder)) for file, folder in _vae_files(name)]


def vae_validity(name: str | None) -> bool | str:
    """As `validity`, of a VAE's name."""
    told = [validity(file, folder) for file, folder in _vae_files(name)] if name is not None else []
    return next((words for words in told if words is not True), True)


def vae_taken_for(name: str) -> str:
    """As `taken_for`, of a VAE's name."""
    return "\n".join(filter(None, (taken_for(file, folder) for file, folder in _vae_files(name))))


def _vae_files(name: str) -> list[tuple[str, str]]:
    """Names and their folders."""
    if not _is_taesd(name):
        return [(name, "vae")]
    files = []
    for part in (ENCODER, DECODER):
        stem = PureWindowsPath(name + part.rpartition(".")[0])
        listed = (
            file for file in folder_paths.get_filename_list(_TAESD) if PureWindowsPath(file).with_suffix("") == stem
        )
        files.append((next(listed, name + part), _TAESD))
    return files


def _find(name: str, folder: str) -> Path | DemoFile:
    """A file of the user's own goes before one of the demo's; one of another subfolder is taken if it alone has that file name."""
    if found := _at(name, folder):
        return found
    alike = [] if has_common_name(_file_name(name)) else _of_the_same_name(name, folder)
    if len(alike) == 1 and (found := next(_places(alike[0], folder), None)):
        return found
    several = f" Several have its file name: {', '.join(alike[:5])}." if alike else ""
    raise CheckpointError(
        f"There is no {name!r} in ComfyUI's {folder} folder.{several}", "Put it there, or choose another."
    )


def _at(name: str, folder: str) -> Path | DemoFile | None:
    """The file of the name itself, whichever machine's separators it has."""
    spellings = dict.fromkeys((name, name.replace("\\", "/")))
    return next((found for spelled in spellings for found in _places(spelled, folder)), None)


def _places(name: str, folder: str) -> Iterator[Path | DemoFile]:
    """Where a name may lie that has this very spelling: the loader's own folder first."""
    if (path := folder_paths.get_full_path(folder, name)) is not None:
        yield Path(path)
    if name.startswith(CHECKPOINTS) and (
        path := folder_paths.get_full_path("checkpoints", name.removeprefix(CHECKPOINTS))
    ):
        yield Path(path)
    if name.startswith(DIFFUSERS) and (pipeline := _pipelines().get(name.removeprefix(DIFFUSERS))):
        yield pipeline
    yield from (demo for demo in FILES.values() if (demo.listed, demo.folder) == (name, folder))


def _of_the_same_name(name: str, folder: str) -> list[str]:
    """Files of the folder, or of the checkpoints folder where the name says that, in whatever subfolder."""
    said = folder != "checkpoints" and name.replace("\\", "/").startswith(CHECKPOINTS)
    prefix, place = (CHECKPOINTS, "checkpoints") if said else ("", folder)
    listed = own_names_in(place)
    return [prefix + other for other in listed if _file_name(other) == _file_name(name)]


def _file_name(name: str) -> str:
    """Whichever machine's separators it has."""
    return PureWindowsPath(name).name


def _pipelines() -> dict[str, Path]:
    """Folders of diffusers' pipelines with a model of a kind that may be ours, by their names below ComfyUI's folder for them."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, inside, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                inside.clear()
                if model_folder(path := Path(folder)) != path:
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def fetching(file: DemoFile, done: int) -> None:
    """Shows on the executing node what has come of the demo's file; an interrupt in ComfyUI ends the fetch."""
    mm.throw_exception_if_processing_interrupted()
    say(f"fetching {file.name}: {done / 2**20:.0f} of {file.size / 2**20:.0f} MiB from {file.url}")


def name_elsewhere(path: Path) -> str:
    """How another machine's backend finds a file of this one's model folders, below its own, or one of the demo's; its own name where
    none has it."""
    if demo := demo_of(path):
        return demo.listed
    kinds = ("checkpoints", "diffusion_models", "controlnet", "vae", _TAESD, "diffusers")
    folders = [Path(folder) for kind in kinds for folder in folder_paths.get_folder_paths(kind)]
    inside = (path.relative_to(folder) for folder in folders if path.is_relative_to(folder))
    return next(inside, Path(path.name)).as_posix()


def listed_elsewhere(name: str, folder: str) -> str:
    """As `name_elsewhere`, of a name that `path_of` takes; the demo's are kept under their listed names."""
    found = _find(name, folder)
    return found.listed if isinstance(found, DemoFile) else name_elsewhere(found)


def vae_listed_elsewhere(name: str) -> list[str]:
    """As `listed_elsewhere`, of a VAE's file or folder, or of TAESD's two."""
    names = []
    for file, folder in _vae_files(name):
        found = _find(file, folder)
        names.append(found.listed if isinstance(found, DemoFile) else name_elsewhere(vae_folder(found)))
    return names


def _is_taesd(name: str) -> bool:
    return _file_name(name) in FAMILIES.values()


def fingerprint(name: str, folder: str) -> str:
    """As `file_fingerprint`, of a name that `names_in` gave; fetches nothing.

    Raises: CheckpointError: no such file in the model folders.
    """
    found = _find(name, folder)
    if isinstance(found, DemoFile):
        return file_fingerprint(found.shipped) if found.shipped.is_file() else found.sha256
    return " ".join(map(file_fingerprint, files_of(vae_folder(found) if folder == "vae" else found)))


def vae_fingerprint(name: str) -> str:
    """As `fingerprint`, of one file or of TAESD's two."""
    return " ".join(fingerprint(file, folder) for file, folder in _vae_files(name))


def file_fingerprint(path: Path) -> str:
    """Changes when the file does, so that the node runs again."""
    stat = path.stat()
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"
