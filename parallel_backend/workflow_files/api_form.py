"""The API's form as a graph: it says no kinds of links, so that they are told by their inputs' names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .graph import Graph, Input, Node
from .reading import JSON

_KINDS = (
    (r"((base|refiner|optional|positive|negative|pos|neg)_)?model(_?[0-9abc]|_opt|_override|_negative)?|ksampler_model", "MODEL"),
    (r"((base|refiner)_)?(positive|negative)|.*conditioning.*|cond[0-9]*|(positive|negative)_[0-9a-z_]+", "CONDITIONING"),
    (r"guider", "GUIDER"),
    (r".*pipe.*|.*sdxl_tuple|(base_)?ctx(_[0-9]+)?", "PIPE"),
    (r"control_?net", "CONTROL_NET"),
    (r"c(ontrol)?_?net_stack", "CONTROL_NET_STACK"),
    (r"(base_|refiner_)?clip[0-9]*", "CLIP"),
)  # fmt: skip
# What these make, by number; of others it is told by who takes it.
_MADE: dict[str, dict[int, str]] = {
    name: {0: "MODEL", 1: "CLIP", 2: "VAE"}
    for name in ("CheckpointLoaderSimple", "CheckpointLoader", "unCLIPCheckpointLoader", "LoadParallelCheckpoint")
} | {name: {0: "MODEL"} for name in ("UNETLoader", "LoadParallelMMDiT", "LoadParallelUNet", "ParallelizeModel")}


def api_graph(prompt: JSON) -> Graph:
    inputs = {key: _inputs(node, prompt) for key, node in prompt.items()}
    made: dict[str, dict[int, str]] = {key: dict(_MADE.get(node["class_type"], {})) for key, node in prompt.items()}
    for entry in (entry for entries in inputs.values() for entry in entries):
        outputs = made[entry.source[0]]
        outputs[entry.source[1]] = outputs.get(entry.source[1]) or entry.kind
    for key, entries in inputs.items():
        inputs[key] = tuple(replace(e, kind=e.kind or made[e.source[0]][e.source[1]]) for e in entries)
    return Graph([_node(key, node, inputs[key], made[key], prompt) for key, node in prompt.items()])


def _node(key: str, node: JSON, inputs: tuple[Input, ...], outputs: dict[int, str], prompt: JSON) -> Node:
    meta = node.get("_meta")
    title = (meta.get("title") if isinstance(meta, dict) else None) or node["class_type"]
    linked = (_texts(prompt[entry.source[0]]) for entry in inputs if not entry.kind)
    texts = (*_texts(node), *(text for texts in linked for text in texts))
    return Node(key, node["class_type"], title, texts, inputs, outputs, prompt, node)


def _inputs(node: JSON, prompt: JSON) -> tuple[Input, ...]:
    linked = ((name, value) for name, value in node.get("inputs", {}).items() if is_link(value, prompt))
    return tuple(Input(name, _kind(name), (str(value[0]), value[1])) for name, value in linked)


def is_link(value: Any, prompt: JSON) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt and isinstance(value[1], int)


def _texts(node: JSON) -> list[str]:
    values = (value.get("content") if isinstance(value, dict) else value for value in node.get("inputs", {}).values())
    return [value for value in values if isinstance(value, str)]


def _kind(name: str) -> str:
    return next((kind for pattern, kind in _KINDS if re.fullmatch(pattern, name)), "")
