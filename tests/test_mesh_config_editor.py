"""Mesh Config in ComfyUI's editor: values of older files at their new places, the picture of the mesh, the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfyui.editor_page import EditorPage

OLD = Path(__file__).parent / "old_workflows"
# As the editor of the last version without an order in its files saved them: none of the values a default.
SET = {
    "ranks": 8, "device": "cpu", "devices": "7,6,5,4,3,2,1,0", "cfg": 1, "ulysses": 2, "ring": 3, "tp": 4, "dp": 5,
    "dtype": "bfloat16", "attention": "flash", "backend": "mine", "memory_budget_mib": 1234, "idle_minutes": 77, "patch": 6,
    "pp": 7, "sliced": True, "address": "tcp://10.0.0.1:5555", "keys": "/some/keys", "compile": True, "nan_is_error": True,
    "graphs": True,
}  # fmt: skip
NEW = {"method": "exact", "warmup_steps": 4}
AS_PUT_DOWN = {
    "ranks": 0, "device": "auto", "devices": "", "cfg": 0, "ulysses": 0, "ring": 1, "tp": 1, "dp": 0, "dtype": "auto",
    "attention": "auto", "backend": "default", "memory_budget_mib": 0, "idle_minutes": 30, "patch": 0, "pp": 1, "sliced": False,
    "address": "", "keys": "", "compile": False, "nan_is_error": False, "graphs": False, **NEW,
}  # fmt: skip


def old(name: str) -> dict[str, Any]:
    return json.loads((OLD / f"{name}.json").read_text())


def queued(editor: EditorPage) -> dict[str, Any]:
    """What Run would send now."""
    return editor.page.evaluate("async () => (await app.graphToPrompt()).output")


def meshes(editor: EditorPage) -> list[dict[str, Any]]:
    """The inputs of each Mesh Config in what Run would send; links as "link"."""
    found = [node["inputs"] for node in queued(editor).values() if node["class_type"] == "MeshConfig"]
    return [{k: "link" if isinstance(v, list) else v for k, v in inputs.items()} for inputs in found]


def saved(editor: EditorPage) -> dict[str, Any]:
    """What the editor would write into a file."""
    return editor.page.evaluate("async () => (await app.graphToPrompt()).workflow")


LINKED = SET | {"ranks": "link", "idle_minutes": "link"}


def test_an_old_file_keeps_each_value_at_its_name(editor: EditorPage) -> None:
    editor.load_workflow(old("by_editor"))
    assert meshes(editor) == [SET | NEW, LINKED | NEW]
    before = queued(editor)
    assert before == api_of_old(), "what was queued before the inputs had another order"
    again = saved(editor)
    editor.load_workflow(again)  # a file of this version now
    assert queued(editor) == before
    editor.load_workflow(again)
    assert queued(editor) == before
    assert not editor.errors, editor.errors


def api_of_old() -> dict[str, Any]:
    prompt = json.loads((OLD / "by_editor_prompt.json").read_text())
    for node in prompt.values():
        if node["class_type"] == "MeshConfig":
            node["inputs"] |= NEW
            node["_meta"]["title"] = "Parallel GPUs (Mesh Config)"
    return prompt


def test_an_old_file_of_a_program_keeps_its_values_and_fits_its_node(editor: EditorPage) -> None:
    workflow = old("by_script")
    editor.load_workflow(workflow)
    assert meshes(editor) == [AS_PUT_DOWN]
    height = editor.page.evaluate("() => app.graph.nodes.find((node) => node.type === 'MeshConfig').size[1]")
    (node,) = (node for node in workflow["nodes"] if node["type"] == "MeshConfig")
    assert height < node["size"][1] - 200  # what was of inputs that are out of sight now


def test_a_file_of_a_still_older_version_has_fewer_values(editor: EditorPage) -> None:
    workflow = old("by_editor")
    for node in workflow["nodes"]:
        if node["type"] == "MeshConfig":
            node["widgets_values"] = node["widgets_values"][:13]  # before patch, pp and what came after
    editor.load_workflow(workflow)
    later = ("patch", "pp", "sliced", "address", "keys", "compile", "nan_is_error", "graphs")
    assert meshes(editor)[0] == SET | NEW | {name: AS_PUT_DOWN[name] for name in later}


def test_values_in_the_order_of_the_servers_list_are_taken_as_they_are(editor: EditorPage) -> None:
    """By programs that make files of prompts, this project's own among them."""
    info = editor.server.get("/object_info/MeshConfig")["MeshConfig"]["input_order"]
    wanted = SET | {"method": "displaced", "warmup_steps": 9}
    workflow = old("by_script")
    (node,) = (node for node in workflow["nodes"] if node["type"] == "MeshConfig")
    node["widgets_values"] = [wanted[name] for name in (*info["required"], *info["optional"])]
    editor.load_workflow(workflow)
    assert meshes(editor) == [wanted]


def test_an_old_file_with_a_subgraph_keeps_its_values(editor: EditorPage) -> None:
    editor.load_workflow(old("by_editor_in_a_subgraph"))
    assert meshes(editor) == [SET | NEW, LINKED | NEW, SET | NEW]
    editor.load_workflow(saved(editor))
    assert meshes(editor) == [SET | NEW, LINKED | NEW, SET | NEW]


CHANGE = "() => { const node = app.graph.nodes.find((n) => n.id == 1); app.canvas.selectItems([node]); }"


def test_copies_and_what_is_undone_keep_their_values(editor: EditorPage) -> None:
    editor.load_workflow(old("by_editor"))
    editor.page.evaluate(CHANGE)
    editor.page.evaluate("() => { app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard(); }")
    assert meshes(editor).count(SET | NEW) == 2
    editor.page.evaluate(
        "() => { const node = app.graph.nodes.find((n) => n.id == 1); node.clone && app.graph.add(node.clone()); }"
    )
    assert meshes(editor).count(SET | NEW) == 3
    editor.load_workflow(old("by_editor"))
    page = editor.page
    page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    page.evaluate("() => app.graph.nodes.find((n) => n.id == 1).widgets.find((w) => w.name === 'ring').value = 9")
    page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    assert meshes(editor)[0] == SET | NEW | {"ring": 9}
    page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    assert meshes(editor) == [SET | NEW, LINKED | NEW]
    page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.redo()")
    assert meshes(editor)[0] == SET | NEW | {"ring": 9}
