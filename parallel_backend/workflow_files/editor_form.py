"""The editor's form as a graph: subgraphs opened, reroutes, Set and Get and bypassed nodes taken out of the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .editor_shape import ENDS, Id
from .graph import ANY, Graph, Input, Node, Output
from .reading import JSON, SAVE_IT, all_graphs

MUTED, BYPASSED = 2, 4
INPUTS_OF_SUBGRAPH, OUTPUTS_OF_SUBGRAPH = -10, -20
_SET, _GET = ("SetNode", "easy setNode"), ("GetNode", "easy getNode")
_REROUTES = ("Reroute", "Reroute (rgthree)", *_SET)
_EVERYWHERE = (
    "Anything Everywhere",
    "Anything Everywhere3",
    "Anything Everywhere?",
    "Prompts Everywhere",
    "Seed Everywhere",
)
NOT_COMPUTED = frozenset({*_REROUTES, *_GET, *_EVERYWHERE, "Note", "MarkdownNote", "PrimitiveNode"})
LONGEST_WAY, DEEPEST = 200, 30


@dataclass(frozen=True)
class Link:
    id: Id
    origin: Id
    origin_slot: int
    target: Id
    target_slot: int


def links_of(graph: JSON) -> dict[Any, Link]:
    """Both of the editor's forms of a link: a list, and an object."""
    found = (
        Link(*(link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")))
        if isinstance(link, dict)
        else Link(*link[:ENDS])
        for link in graph.get("links", [])
        if link is not None
    )
    return {link.id: link for link in found}


def editor_graph(workflow: JSON) -> Graph:
    """Muted and bypassed nodes are not in it, as they are not in what the editor queues."""
    definitions = {str(graph.get("id")): graph for graph in all_graphs(workflow)[1:]}
    groups = (workflow.get("extra") or {}).get("groupNodes") or {}
    return Graph(list(Scope(workflow, definitions, groups).flat()))


class Scope:
    """One graph of the file, seen from the place where it is used."""

    def __init__(
        self,
        graph: JSON,
        definitions: dict[str, JSON],
        groups: JSON,
        parent: Scope | None = None,
        instance: JSON | None = None,
    ) -> None:
        self.graph, self.definitions, self.groups = graph, definitions, groups
        self.parent, self.instance = parent, instance
        self.path: str = "" if parent is None or instance is None else f"{parent.path}{instance['id']}:"
        self.nodes: dict[str, JSON] = {str(node["id"]): node for node in graph["nodes"]}
        self.links = links_of(graph)

    def flat(self) -> Iterator[Node]:
        for node in self.graph["nodes"]:
            if node.get("mode") in (MUTED, BYPASSED) or node["type"] in NOT_COMPUTED:
                continue
            if (inner := self._inner(node)) is not None:
                yield from inner.flat()
            else:
                yield self._flat_node(node)

    def _inner(self, node: JSON) -> Scope | None:
        definition = self.definitions.get(node["type"])
        if definition is None:
            return None
        if self.path.count(":") > DEEPEST:
            raise InputError(f"The subgraph {definition.get('name')!r} contains itself.", SAVE_IT)
        return Scope(definition, self.definitions, self.groups, self, node)

    def _flat_node(self, node: JSON) -> Node:
        found = []
        for slot, entry in enumerate(node.get("inputs") or []):
            source = self._source(entry.get("link")) or self._broadcast(node, slot)
            if source is not None:
                found.append(Input(str(entry.get("name", "")), _kind(entry), source))
        group = self.groups.get(node["type"].removeprefix("workflow").lstrip(">/")) or {}
        return Node(
            key=self.path + str(node["id"]),
            class_type=node["type"],
            title=node.get("title") or (node.get("properties") or {}).get("Node name for S&R") or node["type"],
            texts=(*self._linked_texts(node), *texts_of(node)),
            inputs=tuple(found),
            outputs={slot: _kind(entry) for slot, entry in enumerate(node.get("outputs") or [])},
            home=self.graph,
            raw=node,
            members=tuple(member.get("type", "") for member in group.get("nodes", [])),
        )

    def _source(self, link_id: Any, steps: int = 0) -> Output | None:
        """The node that computes what comes over the link; None for an end that is muted, cut or runs in a circle."""
        link = self.links.get(link_id)
        if link is None or steps > LONGEST_WAY:
            return None
        if str(link.origin) == str(INPUTS_OF_SUBGRAPH):
            return self._from_outside(link.origin_slot, steps)
        node = self.nodes.get(str(link.origin))
        if node is None or node.get("mode") == MUTED:
            return None
        inputs = node.get("inputs") or []
        if node.get("mode") == BYPASSED:
            return self._source(_passed_through(node, link.origin_slot), steps + 1)
        if node["type"] in _REROUTES:
            return self._source(inputs[0].get("link") if inputs else None, steps + 1)
        if node["type"] in _GET:
            return self._source(self._set_link(texts_of(node)), steps + 1)
        if (inner := self._inner(node)) is not None:
            ends = (end for end in inner.links.values() if str(end.target) == str(OUTPUTS_OF_SUBGRAPH))
            end = next((end for end in ends if end.target_slot == link.origin_slot), None)
            return None if end is None else inner._source(end.id, steps + 1)
        return self.path + str(node["id"]), link.origin_slot

    def _from_outside(self, slot: int, steps: int) -> Output | None:
        entry = self._outer_input(slot)
        return None if entry is None or self.parent is None else self.parent._source(entry.get("link"), steps + 1)

    def _outer_input(self, slot: int) -> JSON | None:
        """The socket of the subgraph's node for its input of that number: sockets are told apart by their names."""
        declared = self.graph.get("inputs") or []
        if self.instance is None or slot >= len(declared):
            return None
        sockets = self.instance.get("inputs") or []
        return next((entry for entry in sockets if entry.get("name") == declared[slot].get("name")), None)

    def _set_link(self, names: tuple[str, ...]) -> Any:
        """The link into the Set node of that name."""
        for node in self.graph["nodes"]:
            if node["type"] in _SET and names and texts_of(node)[:1] == names[:1]:
                return next((entry.get("link") for entry in node.get("inputs") or []), None)
        return None

    def _broadcast(self, node: JSON, slot: int) -> Output | None:
        """What "Use Everywhere" sends to an input without a link: it lists its wires in the workflow's extra."""
        for wire in (self.graph.get("extra") or {}).get("ue_links") or []:
            if str(wire.get("downstream")) == str(node["id"]) and wire.get("downstream_slot") == slot:
                upstream, number = str(wire.get("upstream")), wire.get("upstream_slot")
                return (self.path + upstream, number) if upstream in self.nodes and number is not None else None
        return None

    def _linked_texts(self, node: JSON) -> Iterator[str]:
        """Strings that widgets get over a link: from a primitive, or from the subgraph's node."""
        for entry in node.get("inputs") or []:
            link = self.links.get(entry.get("link")) if "widget" in entry else None
            if link is None:
                continue
            if str(link.origin) == str(INPUTS_OF_SUBGRAPH):
                yield from self._outer_text(link.origin_slot)
            elif (source := self.nodes.get(str(link.origin))) is not None:
                yield from texts_of(source)

    def _outer_text(self, slot: int) -> Iterator[str]:
        entry, values = self._outer_input(slot), (self.instance or {}).get("widgets_values")
        if entry is None or "widget" not in entry or not isinstance(values, list):
            return
        widgets = [socket for socket in (self.instance or {}).get("inputs") or [] if "widget" in socket]
        number = widgets.index(entry)
        if number < len(values) and isinstance(values[number], str):
            yield values[number]


def texts_of(node: JSON) -> tuple[str, ...]:
    """The strings among its widgets' values; some packs keep a file's name in an object, as "content"."""
    values = node.get("widgets_values") or []
    found = values.values() if isinstance(values, dict) else values
    plain = (value.get("content") if isinstance(value, dict) else value for value in found)
    return tuple(value for value in plain if isinstance(value, str))


def _kind(socket: JSON) -> str:
    kind = socket.get("type")
    return kind if isinstance(kind, str) else ANY


def _passed_through(node: JSON, slot: int) -> Any:
    """The link whose value a bypassed node hands on: the input beside the output if its kind fits, else the first that fits."""
    inputs, outputs = node.get("inputs") or [], node.get("outputs") or []
    if slot >= len(outputs):
        return None
    beside = inputs[slot : slot + 1]
    fitting = [entry for entry in (*beside, *inputs) if _kind(entry) in (_kind(outputs[slot]), ANY)]
    return next((entry.get("link") for entry in fitting), None)
