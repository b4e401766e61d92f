"""Which text encoders lie at a path: told by names and shapes of tensors, never by a file's name. Reads no weight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint_files.header import entries_of
from ..checkpoint_files.layout import files_of
from ..errors import CheckpointError, UnsupportedError
from . import open_clip_names

Kind = Literal["clip_l", "clip_g", "t5"]
NAMES = {"clip_l": "CLIP-L", "clip_g": "CLIP bigG", "t5": "T5-XXL"}
# In a full checkpoint: SD3's, then SDXL's, then the refiner's. Where a file is an encoder alone, nothing stands before its names.
_PREFIXES = (
    *(f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")),
    *("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    "",
)
# A pipeline's folders, and what their encoders are of which family.
_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_CLIP = "text_model.embeddings.token_embedding.weight"
_BARE_CLIP = "embeddings.token_embedding.weight"
_OPEN_CLIP = "token_embedding.weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
_WIDTHS: dict[int, Kind] = {768: "clip_l", 1280: "clip_g"}


@dataclass(frozen=True)
class EncoderFile:
    """A text encoder at `path`, a file or a folder in transformers' layout.

    Args:
        prefix: what stands before its tensors' names there.
        shapes: of its tensors, by their names without the prefix.
        config: of its folder's config.json; None for a single file, whose sizes its tensors tell.
    """

    kind: Kind
    path: Path
    prefix: str
    shapes: Mapping[str, Sequence[int]]
    config: Mapping[str, Any] | None = None

    @property
    def is_open_clip(self) -> bool:
        return open_clip_names.MARK in self.shapes


def find(paths: Sequence[Path]) -> dict[Kind, EncoderFile]:
    """The encoders at these paths: single files, folders in transformers' layout, pipelines' folders, full checkpoints.

    Raises: CheckpointError: one holds no encoder that is known, or two are of one kind.
    """
    found: dict[Kind, EncoderFile] = {}
    for path in paths:
        here = _in_pipeline(path) or _in_file(path)
        if not here:
            raise CheckpointError(
                f"{path.name} holds no text encoder of SD3 or SDXL.",
                "Give clip_l, clip_g or t5xxl: a .safetensors file, or a folder with model.safetensors and config.json.",
            )
        for encoder in here:
            if (other := found.get(encoder.kind)) is not None:
                raise CheckpointError(
                    f"{path} and {other.path} are both {NAMES[encoder.kind]}.", "Give each encoder once."
                )
            found[encoder.kind] = encoder
    return found


def find_inside(path: Path) -> dict[Kind, EncoderFile]:
    """Those that a checkpoint brings, in its file or its pipeline's folder; none where it has none."""
    found = _in_pipeline(path) or ([] if path.is_dir() else _in_file(path))
    return {encoder.kind: encoder for encoder in found}


def _in_pipeline(path: Path) -> list[EncoderFile]:
    """Of a pipeline's folder: which encoder lies in which of its folders, its config says."""
    folders = [path / name for name in _FOLDERS if (path / name).is_dir()]
    return [_in_folder(folder) for folder in folders]


def _in_file(path: Path) -> list[EncoderFile]:
    if path.is_dir():
        return [_in_folder(path)] if (path / "config.json").is_file() else []
    entries = entries_of(path)
    found = []
    for prefix in _PREFIXES:
        shapes = {n.removeprefix(prefix): entry["shape"] for n, entry in entries.items() if n.startswith(prefix)}
        if (kind := _kind(shapes)) is not None:
            found.append(EncoderFile(kind, path, prefix, shapes))
    return found


def _in_folder(path: Path) -> EncoderFile:
    """Raises: CheckpointError: no encoder that is known, or no config that can be read."""
    files = files_of(path)
    if unsafe := [file.name for file in files if file.suffix != ".safetensors"]:
        raise UnsupportedError(
            f"{path} holds its weights as {unsafe[0]}, a pickle.", "Download the model's .safetensors file."
        )
    try:
        config = json.loads((path / "config.json").read_bytes())
        known = {"clip_text_model": "clip", "t5": "t5"}[config["model_type"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} has no config.json of a CLIP text model or T5.", "Give the whole folder as the hub has it."
        ) from None
    shapes = {name: entry["shape"] for name, entry in entries_of(path).items()}
    # Both CLIPs are of one class: bigG has the plain GELU, and the second place in every pipeline.
    is_second = path.name == _FOLDERS[1] or (path.name != _FOLDERS[0] and config.get("hidden_act") == "gelu")
    kind: Kind = "t5" if known == "t5" else "clip_g" if is_second else "clip_l"
    return EncoderFile(kind, path, "", shapes, config)


def _kind(shapes: Mapping[str, Sequence[int]]) -> Kind | None:
    """What tensors of these names are; None: no encoder of SD3 or SDXL."""
    if _T5 in shapes:
        return "t5"
    token = next((shapes[name] for name in (_CLIP, _BARE_CLIP, _OPEN_CLIP) if name in shapes), None)
    return None if token is None else _WIDTHS.get(token[1])
