"""Which tensors of a safetensors file bitsandbytes has quantised to 4 bits (NF4, FP4), and how.

It leaves a weight's values as bytes of two each, in the order of its rows, and beside them the largest of each block, the 16 values that a
block can have, and a JSON text. With double quantisation the largest are quantised to 8 bits in blocks of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import isfinite, prod
from typing import Any

from ..errors import CheckpointError, UnsupportedError

FOUR_BITS = ("nf4", "fp4")
_STATE = ".quant_state.bitsandbytes__"
_DTYPES = ("float16", "bfloat16", "float32")
# bitsandbytes has kernels for these.
_BLOCKS = tuple(2**n for n in range(5, 13))


def bitsandbytes_weights(
    entries: Mapping[str, Any], text: Callable[[str], bytes], file_name: str
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], tuple[str, ...], dict[str, Any]]]]:
    """By name the form, shape, parts and options of each, as PackedEntry has them.

    The parts are the values, the largest of each block, and the table of values; with double quantisation, the same two of the
    largest. Options: `blocksize`, `dtype`, and with double quantisation `nested_blocksize` and `nested_offset`.

    Args:
        entries: of the file's header. text: reads the bytes of a tensor.
    Raises: CheckpointError: a part is missing, or doesn't fit the others. UnsupportedError: packed in another way.
    """
    for name in entries:
        weight, mark, form = name.rpartition(_STATE)
        if not mark:
            continue
        state = _state(weight, form, text(name), file_name)
        is_nested = "nested_blocksize" in state
        beside = ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if is_nested else ()))
        parts = (weight, *(f"{weight}.{part}" for part in beside))
        missing = [part for part in parts if part not in entries]
        if missing:
            raise CheckpointError(f"{file_name} lacks {', '.join(missing)}.", "The file is not whole; get it again.")
        _check_parts(state, {part: entries[part] for part in parts}, file_name)
        yield weight, (form, tuple(state["shape"]), parts, state)


def is_beside(name: str, weights: Mapping[str, Any]) -> bool:
    """Whether the tensor is a part of one of those weights, and none of the model's own."""
    weight = name.partition(_STATE)[0] if _STATE in name else name.rpartition(".")[0]
    return weight in weights


def _state(weight: str, form: str, text: bytes, file_name: str) -> dict[str, Any]:
    try:
        state = dict(json.loads(text))
        shape, blocks = state["shape"], [state["blocksize"], state.get("nested_blocksize", 256)]
        known = state["quant_type"] == form and form in FOUR_BITS and state["dtype"] in _DTYPES
        known = known and all(type(block) is int and block in _BLOCKS for block in blocks)
        known = known and len(shape) == 2 and all(type(side) is int and 0 < side < 2**31 for side in shape)
        if known and "nested_blocksize" in state:
            state["nested_offset"] = float(state["nested_offset"])
            known = isfinite(state["nested_offset"]) and state.get("nested_dtype", "float32") == "float32"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        known = False
    if not known:
        raise CheckpointError(
            f"{file_name}: {weight} says in no readable way how bitsandbytes has quantised it.",
            "Download it again; or it is quantised in a way that this version doesn't know.",
        )
    return state


def _check_parts(state: Mapping[str, Any], parts: Mapping[str, Any], file_name: str) -> None:
    weight, *beside = parts
    if parts[weight]["dtype"] != "U8":
        raise UnsupportedError(
            f"{file_name}: bitsandbytes has packed {weight} in {parts[weight]['dtype']}.",
            "Use a file that is packed in bytes (quant_storage uint8).",
        )
    values = prod(state["shape"])
    blocks = -(-values // state["blocksize"])
    wanted = {weight: ("U8", -(-values // 2)), beside[0]: ("F32", blocks), beside[1]: ("F32", 16)}
    if len(beside) > 2:
        nested = -(-blocks // state["nested_blocksize"])
        wanted |= {beside[0]: ("U8", blocks), beside[2]: ("F32", nested), beside[3]: ("F32", 256)}
    for name, (dtype, count) in wanted.items():
        found = parts[name]
        if found["dtype"] != dtype or found["shape"][:1] != [count] or prod(found["shape"]) != count:
            raise CheckpointError(
                f"{file_name}: {name} is {found['dtype']} of shape {found['shape']}, where {weight} of shape {state['shape']} "
                f"in blocks of {state['blocksize']} has {count} of {dtype}.",
                "The file is damaged: download it again.",
            )
