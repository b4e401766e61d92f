"""What is read of a file of the editor's, and of which types; all else in it is left as it is."""

from __future__ import annotations

from typing import Any

import msgspec

Id = int | str
# id, origin_id, origin_slot, target_id, target_slot; the kind comes after.
_LISTED = tuple[Id, Id, int, Id, int]
ENDS = 5


class _Socket(msgspec.Struct):
    name: Any = ""
    link: Id | None = None
    links: list[Id] | None = None


class _Node(msgspec.Struct):
    id: Id
    type: str
    mode: int | None = None
    inputs: list[_Socket] | None = None
    outputs: list[_Socket] | None = None
    properties: dict[str, Any] | None = None
    widgets_values: list[Any] | dict[str, Any] | None = None


class _Link(msgspec.Struct):
    id: Id
    origin_id: Id
    origin_slot: int
    target_id: Id
    target_slot: int


class _State(msgspec.Struct):
    lastNodeId: int | None = None
    lastLinkId: int | None = None


class _Wire(msgspec.Struct):
    upstream_slot: int | None = None


class _Group(msgspec.Struct):
    nodes: list[dict[str, Any]] = []


class _Extra(msgspec.Struct):
    ue_links: list[_Wire] | None = None
    groupNodes: dict[str, _Group] | None = None


class _Graph(msgspec.Struct):
    nodes: list[_Node]
    links: list[list[Any] | _Link | None]
    inputs: list[dict[str, Any]] | None = None
    state: _State | None = None
    last_node_id: int | None = None
    last_link_id: int | None = None
    extra: _Extra | None = None


class _Definitions(msgspec.Struct):
    subgraphs: list[_Graph] | None = None


class _Workflow(_Graph):
    definitions: _Definitions | None = None


def damage(workflow: dict[str, Any]) -> str:
    """Where and what is not as the editor writes it, "" for a whole one."""
    try:
        whole = msgspec.convert(workflow, _Workflow)
        for graph in (whole, *((whole.definitions and whole.definitions.subgraphs) or [])):
            for link in graph.links:
                if isinstance(link, list):
                    msgspec.convert(link[:ENDS], _LISTED)
            ids = [str(node.id) for node in graph.nodes]
            if twice := next((name for name in ids if ids.count(name) > 1), ""):
                return f"two nodes have the id {twice}"
    except msgspec.ValidationError as error:
        return str(error)
    return ""
