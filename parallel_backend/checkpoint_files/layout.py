"""Which files of a folder hold its model: chosen as diffusers chooses them, so that no weight is taken twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import CheckpointError

# Of a diffusers pipeline's folder, the parts that hold a diffusion model.
_PARTS = ("transformer", "unet")
_NAMES = ("diffusion_pytorch_model", "model")
_INDEX = ".index"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_KINDS = (".safetensors", ".bin")


def model_folder(path: Path) -> Path:
    """The folder that holds the weights: a diffusers pipeline keeps them in `transformer` or `unet`."""
    return next((path / part for part in _PARTS if (path / part).is_dir()), path)


def vae_folder(path: Path) -> Path:
    """As `model_folder`, of a pipeline's VAE."""
    return path / "vae" if (path / "vae").is_dir() else path


def has_common_name(file_name: str) -> bool:
    """Whether many models' files are called so: a name that tells nothing of which one is meant."""
    return _SHARD.fullmatch(file_name) is not None or file_name.partition(".")[0] in _NAMES


def files_of(path: Path) -> list[Path]:
    """The files of the model at `path`: itself; those that a folder's index names; those of a shard, which is no model alone.

    Raises: CheckpointError: a folder without a model, or with several of which none is the plain one; a shard that isn't there.
    """
    if not path.is_dir():
        match = _SHARD.fullmatch(path.name)
        return [path] if match is None else _shards(path.parent, match[1], int(match[3]))
    path = model_folder(path)
    for kind in _KINDS:
        if files := _of_kind(path, kind):
            return files
    raise CheckpointError(f"The folder {path} holds no .safetensors file.", "Name the model's own folder.")


def _of_kind(folder: Path, kind: str) -> list[Path]:
    """The folder's files of that suffix; none where it has none."""
    for name in _NAMES:
        if (folder / f"{name}{kind}{_INDEX}.json").is_file():
            return _indexed(folder / f"{name}{kind}{_INDEX}.json")
        if (folder / f"{name}{kind}").is_file():
            return [folder / f"{name}{kind}"]
    found = sorted(folder.glob(f"*{kind}"))
    indexes = sorted(folder.glob(f"*{kind}{_INDEX}*.json"))
    shards = {match.group(1, 3) for file in found if (match := _SHARD.fullmatch(file.name))}
    whole = [file for file in found if not _SHARD.fullmatch(file.name)]
    if len(indexes) == 1 and not whole:
        return _indexed(indexes[0])
    if len(shards) == 1 and not whole:
        ((stem, count),) = shards
        return _shards(folder, stem, int(count))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise CheckpointError(f"The folder {folder} holds several models: {names}.", "Name the file that is meant.")
    return found


def _indexed(index: Path) -> list[Path]:
    """Raises: CheckpointError: not an index, one of files elsewhere, or a file that it names is missing."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elsewhere = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is no index of safetensors files.", "Download the folder again.") from None
    if elsewhere or not names:
        raise CheckpointError(
            f"{index} names {', '.join(elsewhere) or 'no file'}, not files beside it.", "Download the folder again."
        )
    return _present(index.parent, names, index.name)


def _shards(folder: Path, stem: str, count: int) -> list[Path]:
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return _present(folder, names, f"{stem} in {count} parts")


def _present(folder: Path, names: list[str], whole: str) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder.name} lacks {', '.join(missing[:5])}, {len(missing)} of the {len(names)} files of {whole}.",
            "Download what is missing.",
        )
    return [folder / name for name in names]
