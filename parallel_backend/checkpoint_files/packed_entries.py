"""Which tensors of a safetensors file are quantised, and how: told by its header and a few bytes beside it.

By bitsandbytes, or in three generations of ComfyUI's files: bare fp8, whose values are the numbers; `scaled_fp8` files with `scale_weight`; and a JSON
text `comfy_quant` beside each weight, or one for all of them in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .bitsandbytes_entries import bitsandbytes_weights, is_beside
from .gguf_file import is_gguf
from .layout import files_of
from .pickled_file import is_pickled
from .safetensors_file import safetensors_header, tensor_bytes

WEIGHT, MARK = ".weight", ".comfy_quant"
_SCALED_FP8, _SCALE_WEIGHT, _SCALE_INPUT = "scaled_fp8", ".scale_weight", ".scale_input"
_METADATA = "_quantization_metadata"
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True)
class _Form:
    """What a form of ComfyUI's keeps beside a weight, and what each byte of the weight holds.

    Args:
        dtype: of the weight in the file.
        scales: names of the tensors beside the weight that it needs.
        packed: values in an element of the last dim.
        block: values of a row that share a scale, whose scales lie in tiles; 0: no blocks.
    """

    dtype: str
    scales: tuple[str, ...]
    packed: int = 1
    block: int = 0


# Rows and blocks of a tile of scales, as kernels of tensor cores want them.
TILE = (128, 4)
# fp8 may lack its scale, which is 1 then.
FORMS = {
    "float8_e4m3fn": _Form("F8_E4M3", ("weight_scale",)),
    "float8_e5m2": _Form("F8_E5M2", ("weight_scale",)),
    "int8_tensorwise": _Form("I8", ("weight_scale",)),
    "nvfp4": _Form("U8", ("weight_scale", "weight_scale_2"), packed=2, block=16),
    "mxfp8": _Form("F8_E4M3", ("weight_scale",), block=32),
}
_OF_A_BYTE = ("U8", "F8_E4M3", "F8_E8M0")
_SCALES = ("weight_scale", "weight_scale_2")
# Beside a weight in its file: a factor of what comes into products in fp8.
_OF_ACTIVATIONS = "input_scale"


@dataclass(frozen=True)
class PackedEntry:
    """A quantised tensor of a file.

    Args:
        shape: of its values.
        parts: names in the file of its data, then of its scales, in the order of the form's; last, of fp8 that is scaled, one of
            what comes in, if the file has it.
        options: as `comfy_quant` says them.
    """

    form: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_tiled(self) -> bool:
        """Whether its first scales lie in tiles."""
        return FORMS[self.form].block > 0

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns that can't be told apart in the file."""
        if not self.is_tiled:
            return 1, self.rotated
        return TILE[0], TILE[1] * FORMS[self.form].block

    @property
    def rotated(self) -> int:
        """Columns that were rotated together; 1 where none were."""
        return self.options.get("convrot_groupsize", 256) if self.options.get("convrot") else 1


def has_packing(path: Path) -> bool:
    """Whether the model at `path` is of safetensors files, which alone are quantised in these ways."""
    return not any(is_pickled(file) or is_gguf(file) for file in files_of(path))


def packed_entries(
    path: Path, prefix: str = "", beside: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, PackedEntry]]:
    """Of the file or folder at `path` the tensors below `prefix`, by their names without it: see `without_packing`.

    Args:
        beside: tensors outside the prefix that are wanted too.
    """
    files: dict[str, Path] = {}
    entries: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files_of(path):
        header = safetensors_header(file)
        metadata |= header.pop("__metadata__", None) or {}
        kept = [name for name in header if name.startswith(prefix) or name in beside]
        entries |= {name.removeprefix(prefix): header[name] for name in kept}
        files |= {name.removeprefix(prefix): file for name in kept}
    return without_packing(entries, metadata, prefix, lambda name: tensor_bytes(files[name], entries[name]), path.name)


def without_packing(
    entries: Mapping[str, Any], metadata: Mapping[str, str], prefix: str, text: Callable[[str], bytes], file_name: str
) -> tuple[dict[str, Any], dict[str, PackedEntry]]:
    """The file's entries as if nothing were quantised, and which ones are.

    Args:
        entries: of the header, by name below `prefix`.
        metadata: of the header, whose names have the prefix. text: reads the bytes of a tensor.
    Raises: UnsupportedError: a form that isn't known here. CheckpointError: a scale is missing or of another shape.
    """
    of_4_bits = {name: PackedEntry(*told) for name, told in bitsandbytes_weights(entries, text, file_name)}
    entries = {name: entry for name, entry in entries.items() if not is_beside(name, of_4_bits)}
    told = _told(entries, metadata, prefix, text, file_name)
    packed = of_4_bits | dict(_packed(entries, told, file_name))
    beside = {name for name in entries if _is_beside(name, told, packed)}
    plain = {name: entry for name, entry in entries.items() if name not in beside}
    for name, found in packed.items():
        plain[name] = {**plain[name], "shape": list(found.shape)}
    return plain, packed


def _told(
    entries: Mapping[str, Any], metadata: Mapping[str, str], prefix: str, text: Callable[[str], bytes], file_name: str
) -> dict[str, Mapping[str, Any]]:
    """By layer, what `comfy_quant` or its forerunner says of its weight."""
    try:
        if _METADATA in metadata:
            layers = dict(json.loads(metadata[_METADATA])["layers"])
            return {name[len(prefix) :]: dict(told) for name, told in layers.items() if name.startswith(prefix)}
        return {
            name.removesuffix(MARK): dict(json.loads(text(name))) for name in entries if name.endswith(MARK)
        } or _scaled(entries)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{file_name} says in no readable way how it is quantised ({MARK[1:]}).", "Download it again."
        ) from None


def _scaled(entries: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of the older files; two elements of their mark say that products are to be of values."""
    if _SCALED_FP8 not in entries:
        return {}
    in_full = prod(entries[_SCALED_FP8]["shape"]) == 2
    scaled = [name.removesuffix(_SCALE_WEIGHT) for name in entries if name.endswith(_SCALE_WEIGHT)]
    kinds = {layer: entries[layer + WEIGHT]["dtype"] for layer in scaled if layer + WEIGHT in entries}
    return {
        layer: {"format": _FP8.get(kind, "float8_e4m3fn"), "full_precision_matrix_mult": in_full}
        for layer, kind in kinds.items()
    }


def _packed(
    entries: Mapping[str, Any], told: Mapping[str, Mapping[str, Any]], file_name: str
) -> Iterator[tuple[str, PackedEntry]]:
    for name, entry in entries.items():
        layer, is_weight = name.removesuffix(WEIGHT), name.endswith(WEIGHT)
        if is_weight and layer in told:
            yield name, _of_layer(layer, told[layer], entries, file_name)
        elif entry["dtype"] in _FP8 and entry["shape"] and not _is_beside(name, told, {}):
            yield name, PackedEntry(_FP8[entry["dtype"]], tuple(entry["shape"]), (name,))


def _of_layer(layer: str, told: Mapping[str, Any], entries: Mapping[str, Any], file_name: str) -> PackedEntry:
    kind = told.get("format")
    if kind not in FORMS:
        raise UnsupportedError(
            f"{file_name}: {layer} is quantised as {kind!r}.", f"Use a file in one of {', '.join(FORMS)}, or as GGUF."
        )
    if f"{layer}.pre_quant_scale" in entries:
        raise UnsupportedError(
            f"{file_name} scales what comes into {layer} (pre_quant_scale).", "Use the fp8 or half-precision file."
        )
    form, name = FORMS[kind], layer + WEIGHT
    scales = [f"{layer}.{scale}" for scale in form.scales]
    if f"{layer}{_SCALE_WEIGHT}" in entries:
        scales = [f"{layer}{_SCALE_WEIGHT}"]
    found = [scale for scale in scales if scale in entries]
    if len(found) != len(scales) and kind not in _FP8.values():
        raise CheckpointError(
            f"{file_name} lacks {', '.join(set(scales) - set(found))}.", "The file is not whole; get it again."
        )
    if found and kind in _FP8.values():
        incoming = (f"{layer}.{_OF_ACTIVATIONS}", f"{layer}{_SCALE_INPUT}")
        found += [scale for scale in incoming if scale in entries and prod(entries[scale]["shape"]) == 1][:1]
    *rest, last = entries[name]["shape"] or [1]
    params = told.get("params")
    options = {**(params if isinstance(params, dict) else {}), **told}
    entry = PackedEntry(kind, (*rest, last * form.packed), (name, *found), options)
    _check_data(entry, entries[name]["dtype"], file_name)
    _check_scales(entry, entries, file_name)
    return entry


def _check_data(entry: PackedEntry, dtype: str, file_name: str) -> None:
    """Raises: CheckpointError: the weight's own tensor is none of its form's, or was rotated in groups that don't fit."""
    name, size = entry.parts[0], entry.rotated
    is_matrix = len(entry.shape) == 2 or entry.form in _FP8.values()
    if dtype != FORMS[entry.form].dtype or not is_matrix:
        raise CheckpointError(
            f"{file_name}: {name} is to be {entry.form}, and is {dtype} of shape {list(entry.shape)}.",
            "The file is damaged, or quantised in a way that this version doesn't know.",
        )
    if not isinstance(size, int) or size < 1 or entry.shape[-1] % size:
        raise CheckpointError(
            f"{file_name}: {name} has {entry.shape[-1]} columns, which groups of {size!r} (convrot_groupsize) don't divide.",
            "The file is damaged: download it again.",
        )


def _check_scales(entry: PackedEntry, entries: Mapping[str, Any], file_name: str) -> None:
    """Raises: CheckpointError: the first scale is not of the shape that the weight's needs."""
    if len(entry.parts) == 1:
        return
    name, scale = entry.parts[0], list(entries[entry.parts[1]]["shape"])
    rows, columns = entry.shape[0], prod(entry.shape[1:])
    if entry.is_tiled:
        (tile_rows, tile_blocks), (_, tile_columns) = TILE, entry.unit
        fits = scale == [-(-rows // tile_rows) * tile_rows, -(-columns // tile_columns) * tile_blocks]
        fits = fits and entries[entry.parts[1]]["dtype"] in _OF_A_BYTE
    else:
        fits = prod(scale) == 1 or scale in ([rows], [rows, *[1] * (len(entry.shape) - 1)])
    if not fits:
        raise CheckpointError(
            f"{file_name}: the scale of {name} has shape {scale}, its values {list(entry.shape)}.",
            "The file is damaged, or quantised in a way that this version doesn't know.",
        )


def _is_beside(name: str, told: Mapping[str, Any], packed: Mapping[str, PackedEntry]) -> bool:
    """Whether the tensor is no part of the model: it says how another one is quantised."""
    if name == _SCALED_FP8 or name.endswith((MARK, _SCALE_WEIGHT, _SCALE_INPUT)):
        return True
    layer, _, leaf = name.rpartition(".")
    if layer in told:
        return leaf in (_OF_ACTIVATIONS, *_SCALES)
    return leaf in _SCALES and any(name in entry.parts[1:] for entry in packed.values())
