"""A JSON file as a workflow: of the editor's form, or of the API's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from ..errors import InputError

SAVE_IT = "Give a file of the editor's Save, or of its Export (API)."
JSON = dict[str, Any]


@dataclass(frozen=True)
class Workflow:
    """`graph` is the part of `content` that has the nodes, the same object: a change there is a change of the file."""

    form: Literal["editor", "API"]
    content: JSON
    graph: JSON
    notes: tuple[str, ...] = ()


def read_workflow(path: Path) -> tuple[Workflow, bool]:
    """The file's workflow, and whether it is written over several lines.

    Raises: InputError: it can't be read, or is something else, which is told.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read as text: {error}.", SAVE_IT) from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.", SAVE_IT) from error
    return workflow_in(content, str(path)), "\n" in text.strip()


def workflow_in(content: Any, name: str) -> Workflow:
    """The workflow in what a JSON file holds; alone, or below "prompt" or "workflow".

    Raises: InputError: none is in it, or a damaged one.
    """
    if not isinstance(content, dict):
        raise InputError(f"{name} is {_kind(content)}, not a workflow.", SAVE_IT)
    if isinstance(content.get("nodes"), list):
        return _editor(content, content, name)
    if _is_prompt(content):
        return _prompt(content, content, name)
    if _is_prompt(inside := content.get("prompt")):
        beside = "workflow" in content or "extra_data" in content
        note = "The editor's workflow that is kept beside the prompt, for the pictures, is left as it was."
        return _prompt(content, inside, name, (note,) if beside else ())
    inside = content.get("workflow")
    if isinstance(inside, dict) and isinstance(inside.get("nodes"), list):
        return _editor(content, inside, name)
    if _is_prompt(inside):
        return _prompt(content, inside, name)
    keys = ", ".join(map(repr, list(content)[:6])) or "nothing"
    raise InputError(f"{name} is JSON, but no workflow: it has {keys}.", SAVE_IT)


def all_graphs(workflow: JSON) -> list[JSON]:
    """The graph of an editor's workflow, then its subgraphs' definitions."""
    definitions = workflow.get("definitions") or {}
    found = definitions.get("subgraphs", []) if isinstance(definitions, dict) else definitions
    return [workflow, *(found or [])]


def _kind(content: Any) -> str:
    return (
        f"a list of {len(content)} entries" if isinstance(content, list) else f"the single value {str(content)[:40]!r}"
    )


def _is_prompt(content: Any) -> TypeGuard[JSON]:
    return (
        isinstance(content, dict)
        and bool(content)
        and any(isinstance(node, dict) and "class_type" in node for node in content.values())
    )


def _prompt(content: JSON, prompt: JSON, name: str, notes: tuple[str, ...] = ()) -> Workflow:
    for node_id, node in prompt.items():
        whole = isinstance(node, dict) and isinstance(node.get("class_type"), str)
        if not whole or not isinstance(node.get("inputs", {}), dict):
            raise InputError(f"Node {node_id!r} of {name} has no class_type with inputs.", SAVE_IT)
    return Workflow("API", content, prompt, notes)


def _editor(content: JSON, workflow: JSON, name: str) -> Workflow:
    try:
        graphs = all_graphs(workflow)
        damaged = next((what for graph in graphs for what in _damaged(graph)), "")
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{name} is damaged: {type(error).__name__} {error}.", SAVE_IT) from error
    if damaged:
        raise InputError(f"{name} is damaged: {damaged}.", SAVE_IT)
    return Workflow("editor", content, workflow)


def _damaged(graph: JSON) -> Iterator[str]:
    if not isinstance(graph.get("nodes"), list) or not isinstance(graph.get("links", []), list):
        yield "a graph without a list of nodes and one of links"
        return
    seen = set()
    for node in graph["nodes"]:
        if not isinstance(node, dict) or not isinstance(node.get("type"), str) or "id" not in node:
            yield f"the node {str(node)[:60]} has no id and type"
            return
        sockets = [*(node.get("inputs") or []), *(node.get("outputs") or [])]
        if not all(isinstance(socket, dict) for socket in sockets):
            yield f"the sockets of node {node['id']} are no objects"
        if str(node["id"]) in seen:
            yield f"two nodes have the id {node['id']}"
        seen.add(str(node["id"]))
    for link in graph.get("links", []):
        whole = (isinstance(link, list) and len(link) >= 5) or (isinstance(link, dict) and "origin_id" in link)
        if link is not None and not whole:
            yield f"the link {str(link)[:60]} doesn't say from where to where it goes"
