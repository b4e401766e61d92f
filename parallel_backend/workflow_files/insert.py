"""ParallelizeModel put on the wire behind a loader, or the loader itself replaced, in either form of a workflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from .api_form import is_link
from .graph import Node
from .known import PARALLELIZE
from .reading import JSON, Workflow, all_graphs

PACK = "parallel-mmdit"
SWAPPED, SWAPPED_FOR = "CheckpointLoaderSimple", "LoadParallelCheckpoint"
WIDTH, HEIGHT, TITLE_BAR, GAP = 270, 46, 30, 40
MESH_SOCKET = {"name": "mesh", "type": "PARALLEL_MESH", "link": None, "shape": 7}


def insert(workflow: Workflow, loader: Node, slot: int) -> str:
    """The new node's id; whatever took the loader's MODEL takes its."""
    if workflow.form == "API":
        return _insert_in_prompt(workflow.graph, loader, slot)
    return str(_insert_in_graph(workflow.graph, loader, slot))


def swap(loader: Node) -> None:
    """CheckpointLoaderSimple becomes LoadParallelCheckpoint, in its place and with its three outputs."""
    node = loader.raw
    if "class_type" in node:
        node["class_type"] = SWAPPED_FOR
        node.setdefault("inputs", {})["parallel_vae"] = False
        return
    node["type"] = SWAPPED_FOR
    kept = {name: value for name, value in (node.get("properties") or {}).items() if name not in ("ver", "aux_id")}
    node["properties"] = {**kept, **_properties(SWAPPED_FOR)}
    node["inputs"] = [*(node.get("inputs") or []), dict(MESH_SOCKET)]
    values = node.get("widgets_values")
    node["widgets_values"] = [*(values[:1] if isinstance(values, list) else [loader.file]), False]
    node.pop("widgets_values_named", None)
    if node.get("title") == "Load Checkpoint":
        del node["title"]


def _insert_in_prompt(prompt: JSON, loader: Node, slot: int) -> str:
    new = str(1 + max((int(number) for key in prompt for number in re.findall(r"\d+", key)), default=0))
    takers = [
        (node["inputs"], name)
        for node in prompt.values()
        for name, value in node.get("inputs", {}).items()
        if is_link(value, prompt) and (str(value[0]), value[1]) == (loader.key, slot)
    ]
    for inputs, name in takers:
        inputs[name] = [new, 0]
    prompt[new] = {
        "inputs": {"model": [loader.key, slot]},
        "class_type": PARALLELIZE,
        "_meta": {"title": "Parallelize Model"},
    }
    return new


def _insert_in_graph(workflow: JSON, loader: Node, slot: int) -> int:
    graph, node = loader.home, loader.raw
    new_id, new_link = 1 + max(_node_ids(workflow)), 1 + max(_link_ids(workflow), default=0)
    moved = []
    for link in graph["links"]:
        if link is not None and _origin(link) == (str(node["id"]), slot):
            _set_origin(link, new_id, 0)
            moved.append(link["id"] if isinstance(link, dict) else link[0])
    made = {
        "id": new_id,
        "type": PARALLELIZE,
        "pos": _free_place(graph, node),
        "size": [WIDTH, HEIGHT],
        "flags": {},
        "order": len(graph["nodes"]),
        "mode": 0,
        "inputs": [{"name": "model", "type": "MODEL", "link": new_link}, dict(MESH_SOCKET)],
        "outputs": [{"name": "model", "type": "MODEL", "links": moved}],
        "properties": _properties(PARALLELIZE),
        "widgets_values": [],
    }
    graph["nodes"].append(made)
    node["outputs"][slot]["links"] = [new_link]
    for wire in (graph.get("extra") or {}).get("ue_links") or []:
        if (str(wire.get("upstream")), wire.get("upstream_slot")) == (str(node["id"]), slot):
            wire |= {"upstream": new_id, "upstream_slot": 0}
    ends = (new_link, node["id"], slot, new_id, 0, "MODEL")
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    as_objects = any(isinstance(link, dict) for link in graph["links"])
    graph["links"].append(dict(zip(names, ends, strict=True)) if as_objects else list(ends))
    _note_last(workflow, graph, new_id, new_link)
    return new_id


def _properties(node_type: str) -> JSON:
    """By these ComfyUI's manager knows which pack to offer to somebody who hasn't this node."""
    return {"cnr_id": PACK, "Node name for S&R": node_type}


def _node_ids(workflow: JSON) -> Iterator[int]:
    """Of all its graphs: newer editors want them to differ across subgraphs."""
    yield workflow.get("last_node_id") or 0
    for graph in all_graphs(workflow):
        yield (graph.get("state") or {}).get("lastNodeId") or 0
        yield from (int(node["id"]) for node in graph["nodes"] if str(node["id"]).isdigit())


def _link_ids(workflow: JSON) -> Iterator[int]:
    yield workflow.get("last_link_id") or 0
    for graph in all_graphs(workflow):
        yield (graph.get("state") or {}).get("lastLinkId") or 0
        found = (link["id"] if isinstance(link, dict) else link[0] for link in graph["links"] if link is not None)
        yield from (number for number in found if isinstance(number, int))


def _note_last(workflow: JSON, graph: JSON, node_id: int, link_id: int) -> None:
    """The numbers from which the editor goes on counting."""
    for counted in (workflow, graph):
        if "last_node_id" in counted:
            counted |= {"last_node_id": node_id, "last_link_id": link_id}
        if isinstance(counted.get("state"), dict):
            counted["state"] |= {"lastNodeId": node_id, "lastLinkId": link_id}


def _origin(link: Any) -> tuple[str, int]:
    return (str(link["origin_id"]), link["origin_slot"]) if isinstance(link, dict) else (str(link[1]), link[2])


def _set_origin(link: Any, node_id: int, slot: int) -> None:
    if isinstance(link, dict):
        link |= {"origin_id": node_id, "origin_slot": slot}
    else:
        link[1:3] = [node_id, slot]


def _free_place(graph: JSON, node: JSON) -> list[float]:
    """Beside the node if there is room, else above or below it, as near as there is; titles of groups stay to be read."""
    x, y, width, height = _box(node)
    taken = [*map(_box, graph["nodes"]), *_titles(graph)]
    row = HEIGHT + TITLE_BAR + GAP / 2
    near = [(x + width + GAP, y), *((x, y - row * n) for n in (1, 2, 3)), (x, y + height + TITLE_BAR + GAP / 2)]
    further = ((x, y - row * n) for n in range(4, 4 + len(taken)))
    free = (place for place in (*near, *further) if not any(_overlap((*place, WIDTH, HEIGHT), box) for box in taken))
    return list(next(free, near[0]))


def _box(node: JSON) -> tuple[float, float, float, float]:
    (x, y), (width, height) = _pair(node.get("pos"), (0, 0)), _pair(node.get("size"), (WIDTH, HEIGHT))
    return x, y, width, height


def _titles(graph: JSON) -> Iterator[tuple[float, float, float, float]]:
    """The strips in which groups have their titles, as boxes below title bars."""
    for group in graph.get("groups") or []:
        bounding = group.get("bounding") if isinstance(group, dict) else None
        if isinstance(bounding, list) and len(bounding) == 4 and all(isinstance(n, (int, float)) for n in bounding):
            yield bounding[0], bounding[1] + TITLE_BAR, bounding[2], 0


def _pair(value: Any, default: tuple[float, float]) -> tuple[float, float]:
    """Editors have written pairs as lists, and as objects with "0" and "1"."""
    found = list(value.values()) if isinstance(value, dict) else value
    whole = isinstance(found, list) and len(found) >= 2 and all(isinstance(part, (int, float)) for part in found[:2])
    return (found[0], found[1]) if whole else default


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Of boxes with their title bars."""
    beside = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0]
    above = a[1] + a[3] <= b[1] - TITLE_BAR or b[1] + b[3] <= a[1] - TITLE_BAR
    return not (beside or above)
