"""The tokenizer of an encoder: beside it, in the hub's cache, or in a ComfyUI. None is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint_files.hub import cached, download
from ..errors import CheckpointError, in_a_line
from .files import NAMES, EncoderFile, Kind
from .loading import import_transformers

_HUB: dict[Kind, tuple[str, ...]] = {
    "clip_l": ("openai/clip-vit-large-patch14",),
    "clip_g": ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai/clip-vit-large-patch14"),
    "t5": ("google/t5-v1_1-xxl",),
}
_COMFYUI: dict[Kind, str] = {
    "clip_l": "comfy/sd1_tokenizer",
    "clip_g": "comfy/sd1_tokenizer",
    "t5": "comfy/text_encoders/t5_tokenizer",
}
_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "clip_l": ("tokenizer", "tokenizer_2"),
    "clip_g": ("tokenizer_2", "tokenizer"),
    "t5": ("tokenizer_3",),
}
# BigG was trained on texts filled up with this token, number 0; only a folder of its own says so.
_BIG_G_FILLS_WITH = "!"
PACK = Path(__file__).absolute().parents[2]


def tokenizer_of(encoder: EncoderFile, given: Sequence[Path]) -> Any:
    """transformers' tokenizer of that encoder, of the first folder that has one: of `given`, beside it, the hub's, ComfyUI's.

    Raises: CheckpointError: none is found, or it can't be read.
    """
    folder = next((folder for folder in _candidates(encoder, given) if _is_for(folder, encoder.kind)), None)
    if folder is None:
        raise CheckpointError(
            f"{NAMES[encoder.kind]} of {encoder.path.name} has no tokenizer: none was given, none lies beside it.",
            "Give tokenizers=FOLDER, put a folder `tokenizer` beside it, set $COMFYUI_PATH to an installed ComfyUI, "
            f"or download it once: {download(_HUB[encoder.kind][0], ('*.json', '*.txt', '*.model'))}",
        )
    transformers = import_transformers()
    cls = transformers.T5TokenizerFast if encoder.kind == "t5" else transformers.CLIPTokenizer
    own = encoder.kind != "clip_g" or folder.name == _FOLDERS["clip_g"][0]
    fills = {} if own else {"pad_token": _BIG_G_FILLS_WITH}
    try:
        return cls.from_pretrained(folder, local_files_only=True, **fills)
    except Exception as error:  # noqa: BLE001 - the package tokenizers raises no other of a file that it can't read
        raise CheckpointError(
            f"The tokenizer in {folder} can't be read by transformers {transformers.__version__}: {in_a_line(error)}.",
            "Download it again. For T5's, transformers may need two packages more: pip install sentencepiece protobuf",
        ) from None


def _candidates(encoder: EncoderFile, given: Sequence[Path]) -> Iterator[Path]:
    names = _FOLDERS[encoder.kind]
    beside = encoder.path if encoder.path.is_dir() else encoder.path.parent
    for folder in (*given, beside, *([beside.parent] if encoder.path.is_dir() else [])):
        yield from (folder / name for name in names)
        yield folder
    for name in _HUB[encoder.kind]:
        if (found := cached(name)) is not None:
            yield found
    # A pack stands in its ComfyUI's folder of packs.
    for comfyui in (os.environ.get("COMFYUI_PATH"), PACK.parents[1]):
        if comfyui:
            yield Path(comfyui) / _COMFYUI[encoder.kind]


def _is_for(folder: Path, kind: Kind) -> bool:
    """Whether a tokenizer of that kind lies there: CLIP's has merges, T5's is a unigram model."""
    if kind == "t5" and (folder / "spiece.model").is_file():
        return True
    if kind != "t5" and (folder / "merges.txt").is_file() and (folder / "vocab.json").is_file():
        return True
    try:
        model = json.loads((folder / "tokenizer.json").read_bytes())["model"]["type"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(model == ("Unigram" if kind == "t5" else "BPE"))
