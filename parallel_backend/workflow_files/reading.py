"""A JSON file as a workflow: of the editor's form, or of the API's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from ..errors import InputError
from .editor_shape import damage

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
    return [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])]


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
    workflow.setdefault("links", [])
    if what := damage(workflow):
        raise InputError(f"{name} is damaged: {what}.", SAVE_IT)
    return Workflow("editor", content, workflow)
