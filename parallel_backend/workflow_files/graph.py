"""A workflow as what is computed: nodes with where each of their inputs comes from, whatever form the file has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Output = tuple[str, int]
_FILE = re.compile(r"\.(safetensors|sft|ckpt|pt|pth|bin|gguf)$", re.I)
_PIPE = re.compile(r"(?<!SAM_)(?<!SEGM_)PIPE|TUPLE|(^|_)CONTEXT$|^BUS$")
ANY = "*"


@dataclass(frozen=True)
class Input:
    """`kind` is MODEL, CONDITIONING, ...; "" where the file doesn't tell it. `source` is a node's key and its output's number."""

    name: str
    kind: str
    source: Output


@dataclass(frozen=True)
class Node:
    """`key` is ComfyUI's own: "12", or "68:87" for node 87 of the subgraph that node 68 is.

    `texts` are its widgets' strings. `home` and `raw` are where the file has it. `members` are the classes in an old group node.
    """

    key: str
    class_type: str
    title: str
    texts: tuple[str, ...]
    inputs: tuple[Input, ...]
    outputs: dict[int, str]
    home: dict[str, Any] = field(repr=False)
    raw: dict[str, Any] = field(repr=False)
    members: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        return [text for text in self.texts if _FILE.search(text)]

    @property
    def file(self) -> str:
        """What a loader loads, "" if it names no file: in the loaders that name several, the model comes first."""
        return next(iter(self.files), "")

    @property
    def label(self) -> str:
        return f'{self.key} "{self.title}"'


class Graph:
    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.key: node for node in nodes}
        self.consumers: dict[Output, list[tuple[Node, Input]]] = {}
        for node in nodes:
            for entry in node.inputs:
                self.consumers.setdefault(entry.source, []).append((node, entry))

    def model_sources(self) -> Iterator[tuple[Node, int]]:
        """Nodes that make a MODEL which somebody takes, and make it of none, with the number of that output."""
        for node in self.nodes.values():
            if not any(carries_model(entry.kind) for entry in node.inputs):
                yield from ((node, slot) for slot in self.taken(node) if node.outputs[slot] == "MODEL")

    def taken(self, node: Node) -> list[int]:
        return [slot for slot in node.outputs if (node.key, slot) in self.consumers]

    def reached(self, node: Node, slot: int, not_past: str = "") -> list[Node]:
        """All that the MODEL of this output gets to, also as a guider or in a pipe; not through nodes of the class `not_past`."""
        found: dict[str, Node] = {}
        ahead = [(node.key, slot)]
        while ahead:
            for consumer, _ in self.consumers.get(ahead.pop(), ()):
                if consumer.key not in found and consumer.class_type != not_past:
                    found[consumer.key] = consumer
                    ahead += [(consumer.key, n) for n, kind in consumer.outputs.items() if carries_model(kind)]
        return list(found.values())

    def behind(self, nodes: Sequence[Node], kinds: Sequence[str]) -> list[Node]:
        """These nodes, and all that they get through inputs of these kinds."""
        found = {node.key: node for node in nodes}
        ahead = list(nodes)
        while ahead:
            for entry in ahead.pop().inputs:
                source = self.nodes.get(entry.source[0])
                if source is not None and source.key not in found and entry.kind in kinds:
                    found[source.key] = source
                    ahead.append(source)
        return list(found.values())


def carries_model(kind: str) -> bool:
    return kind in ("MODEL", "GUIDER", ANY) or is_pipe(kind)


def is_pipe(kind: str) -> bool:
    """Packs' bundles of MODEL, CLIP, VAE and CONDITIONING on one wire."""
    return _PIPE.search(kind) is not None
