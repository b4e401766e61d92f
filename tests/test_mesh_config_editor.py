"""Mesh Config in ComfyUI's editor: values of older files at their new places, the picture of the mesh, the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfyui.editor_page import EditorPage, OpenEditor
from playwright.sync_api import TimeoutError

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
EMPTY = {
    "last_node_id": 0,
    "last_link_id": 0,
    "nodes": [],
    "links": [],
    "groups": [],
    "config": {},
    "extra": {},
    "version": 0.4,
}


@pytest.fixture
def editor(kept_editor: EditorPage) -> EditorPage:
    """With no nodes, and no errors yet."""
    kept_editor.load_workflow(EMPTY)
    kept_editor.errors.clear()
    return kept_editor


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
    (node,) = (node for node in workflow["nodes"] if node["type"] == "MeshConfig")
    editor.page.wait_for_function(  # its height was that of inputs that are out of sight now
        "(most) => app.graph.nodes.find((node) => node.type === 'MeshConfig').size[1] < most",
        arg=node["size"][1] - 200,
    )


def test_a_file_of_a_still_older_version_has_fewer_values(editor: EditorPage) -> None:
    workflow = old("by_editor")
    for node in workflow["nodes"]:
        if node["type"] == "MeshConfig":
            node["widgets_values"] = node["widgets_values"][:13]  # before patch, pp and what came after
    editor.load_workflow(workflow)
    later = ("patch", "pp", "sliced", "address", "keys", "compile", "nan_is_error", "graphs")
    assert meshes(editor)[0] == SET | NEW | {name: AS_PUT_DOWN[name] for name in later}


@pytest.mark.parametrize("count", [21, 18, 13])
def test_the_text_that_older_editors_save_on_a_node_is_no_value(count: int, editor: EditorPage) -> None:
    workflow = old("by_editor")
    for node in workflow["nodes"]:
        if node["type"] == "MeshConfig":
            node["widgets_values"] = [*node["widgets_values"][:count], "8 ranks on cpu: cfg=2, dtype auto"]
    editor.load_workflow(workflow)
    later = {name: AS_PUT_DOWN[name] for name in list(SET)[count:]}
    assert meshes(editor)[0] == SET | NEW | later
    assert not editor.errors, editor.errors


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


PUT_DOWN = """(values) => {
    const node = LiteGraph.createNode("MeshConfig");
    node.pos = [300, 120];
    app.graph.clear();
    app.graph.add(node);
    for (const widget of node.widgets) {
        if (!(widget.name in values)) continue;
        widget.value = values[widget.name];
        widget.callback?.(widget.value);
    }
}"""
NODE = "app.graph.nodes.find((node) => node.type === 'MeshConfig')"
SHOWN = f"{NODE}.meshPicture.shown"


def put_down(editor: EditorPage, **values: Any) -> None:
    """A new node with these values, alone in the graph."""
    editor.load_workflow(EMPTY)
    # All of them: the editor keeps values by a node's number, and an earlier one had the same.
    editor.page.evaluate(PUT_DOWN, AS_PUT_DOWN | {"device": "cpu"} | values)


def change(editor: EditorPage, name: str, value: Any) -> None:
    """As the widget does when a person changes it."""
    code = f"([name, value]) => {{ const w = {NODE}.widgets.find((w) => w.name === name); w.value = value; w.callback(value); }}"
    editor.page.evaluate(code, [name, value])


def wait_for_words(editor: EditorPage, words: str) -> str:
    """Until the picture's place shows them; all that it shows."""
    editor.page.wait_for_function(f"(words) => {SHOWN}.textContent.includes(words)", arg=words, timeout=20_000)
    return editor.page.evaluate(f"() => {SHOWN}.textContent")


def boxes(editor: EditorPage) -> list[str]:
    """The words in each of the pictures."""
    return editor.page.evaluate(
        f"() => [...{SHOWN}.querySelectorAll('svg')].map((svg) => [...svg.querySelectorAll('text')].map((t) => t.textContent).join(' '))"
    )


def test_the_node_draws_the_mesh_of_each_kind_and_follows_its_widgets(editor: EditorPage) -> None:
    put_down(editor, ranks=2)
    wait_for_words(editor, "SD3, SDXL: cfg=2")
    assert boxes(editor) == ["cfg: cond | uncond 0 1"]
    change(editor, "ranks", 4)
    wait_for_words(editor, "SDXL (UNet): cfg=2 patch=2")
    assert boxes(editor)[0] == "cfg: cond · ulysses 0..1 0 1 cfg: uncond · ulysses 0..1 2 3"
    assert boxes(editor)[1] == "cfg: cond · patch: bands 0..1 0 1 cfg: uncond · patch: bands 0..1 2 3"
    change(editor, "method", "displaced")
    assert "displaced steps on pp" in wait_for_words(editor, "SD3 (MMDiT): cfg=2 pp=2")
    change(editor, "patch", 4)
    assert "SDXL (UNet): patch=4" in wait_for_words(editor, "SD3 (MMDiT): none. patch=4 can't be used on an MMDiT")
    assert boxes(editor) == ["patch: bands 0..3 0 1 2 3"]
    assert editor.page.evaluate(f"() => {SHOWN}.offsetHeight") > 60  # it is seen
    assert not editor.errors, editor.errors


def test_values_that_do_not_fit_are_said_before_they_are_queued(editor: EditorPage) -> None:
    put_down(editor, ranks=4, ulysses=3)
    words = wait_for_words(editor, "but the backend has 4 ranks")
    assert "Choose degrees whose product is 4" in words and not boxes(editor)
    change(editor, "ulysses", 2)
    wait_for_words(editor, "SD3 (MMDiT): cfg=2 ulysses=2")


def test_a_mesh_that_a_link_decides_is_not_guessed(editor: EditorPage) -> None:
    put_down(editor, ranks=2)
    wait_for_words(editor, "cfg=2")
    link = """() => {
        const given = LiteGraph.createNode("PrimitiveInt");
        app.graph.add(given);
        const node = NODE;
        given.connect(0, node, node.inputs.findIndex((input) => input.name === "ring"));
    }""".replace("NODE", NODE)
    editor.page.evaluate(link)
    wait_for_words(editor, "known when it runs: a link gives ring")
    assert not boxes(editor)
    unlink = f"() => {NODE}.disconnectInput({NODE}.inputs.findIndex((input) => input.name === 'ring'))"
    editor.page.evaluate(unlink)
    wait_for_words(editor, "cfg=2")


def height(editor: EditorPage) -> float:
    """Of the node as it is seen, in px of the graph."""
    if editor.variant == "nodes2":
        return editor.page.locator("[data-node-id]").evaluate("(node) => node.offsetHeight")
    return editor.page.evaluate(f"() => {NODE}.size[1]")


def test_its_picture_is_no_value_of_the_node_and_its_height_stays_when_it_is_opened_again(editor: EditorPage) -> None:
    put_down(editor, ranks=8)
    wait_for_words(editor, "SD3 (MMDiT): cfg=2 ulysses=4")
    editor.page.wait_for_function(f"() => {NODE}.meshPicture.height > 100")
    workflow, before = saved(editor), height(editor)
    (node,) = workflow["nodes"]
    assert len(node["widgets_values"]) == len(AS_PUT_DOWN)
    for _ in range(2):
        editor.load_workflow(saved(editor))
        wait_for_words(editor, "SD3 (MMDiT): cfg=2 ulysses=4")
        editor.page.wait_for_function(f"() => {NODE}.meshPicture.height > 100")
        assert height(editor) == pytest.approx(before, abs=2)


def test_advanced_inputs_are_out_of_sight_until_they_are_asked_for(open_editor: OpenEditor) -> None:
    editor = open_editor("classic")
    put_down(editor, ranks=2)
    wait_for_words(editor, "cfg=2")
    seen = f"() => {NODE}.widgets.filter((w) => !w.hidden).map((w) => w.name)"
    assert editor.page.evaluate(seen) == ["ranks", "method", "dtype", "mesh_picture"]
    low = height(editor)
    editor.page.get_by_role("button", name="Show advanced inputs").click()
    assert (
        editor.page.evaluate(seen)[:-1] == list(editor.page.evaluate(f"() => {NODE}.widgets.map((w) => w.name)"))[:-1]
    )
    assert height(editor) > low + 300
    editor.load_workflow(saved(editor))
    editor.page.get_by_role("button", name="Hide advanced inputs").click()
    assert len(editor.page.evaluate(seen)) == 4 and height(editor) == pytest.approx(low, abs=2)
    editor = open_editor("nodes2")
    put_down(editor, ranks=2)
    wait_for_words(editor, "cfg=2")
    node = editor.page.locator("[data-node-id]")
    assert "method" in node.inner_text() and "warmup_steps" not in node.inner_text()
    assert node.get_by_role("button", name="advanced inputs").count() == 1  # the editor's own
    node.get_by_test_id("advanced-inputs-button").click()
    node.get_by_text("warmup_steps").wait_for()


DRAW = """async ([count, axes, more]) => {
    const { meshPicture } = await import("/extensions/parallel-mmdit/mesh_picture.js");
    const ranks = Array.from({ length: count }, (_, rank) => ({ rank, label: String(rank), fill: null, ...more }));
    const svg = meshPicture(ranks, axes);
    document.body.append(svg);
    const words = [...svg.querySelectorAll("text")].map((text) => text.textContent);
    const outside = [...svg.querySelectorAll("text, rect")].map((part) => part.getBoundingClientRect());
    const all = svg.getBoundingClientRect();
    svg.remove();
    const isIn = (r) => r.left >= all.left - 1 && r.right <= all.right + 1 && r.top >= all.top - 1 && r.bottom <= all.bottom + 1;
    return { words, within: outside.every(isIn), width: all.width };
}"""


def test_pictures_of_any_mesh_keep_within_themselves_and_fold_what_is_many(open_editor: OpenEditor) -> None:
    page = open_editor("classic").page

    def drawn(count: int, more: dict[str, Any] | None = None, **degrees: int) -> list[str]:
        axes = [{"name": name, "size": size} for name, size in degrees.items()]
        answer = page.evaluate(DRAW, [count, axes, more or {}])
        assert answer["within"] and answer["width"] <= 420, (count, degrees, answer)
        return answer["words"]

    assert drawn(1) == ["0"]
    assert drawn(3) == ["0", "1", "2"]  # of axes that are not known
    assert drawn(2, pp=2) == ["pp: stages 0..1", "0", "1"]
    nested = drawn(8, {"detail": "1.2 of 80 GiB", "fill": 0.5}, cfg=2, ring=2, ulysses=2)
    assert nested[:2] == ["cfg: cond", "ring 0 · ulysses 0..1"] and nested.count("1.2 of 80 GiB") == 8
    many = drawn(256, dp=8, cfg=2, ulysses=16)
    assert many[-1] == "x 8 (dp 8)" and len([word for word in many if word.isdigit()]) == 32
    long = drawn(128, ulysses=128)
    assert long[0] == "ulysses 0..127" and long[-1] == "+ 112"


def open_search(page: Any) -> None:
    """An editor that is still at something else lets a double click go by."""
    for tries_left in (2, 1, 0):
        page.mouse.dblclick(640, 400)
        try:
            page.locator("input:focus").wait_for(timeout=5000)
            return
        except TimeoutError:
            if not tries_left:
                raise


def test_the_search_finds_it_among_3d_meshes_and_core_s_own(open_editor: OpenEditor) -> None:
    editor = open_editor("classic")
    editor.load_workflow(EMPTY)
    page = editor.page
    for words, place in {"gpu": 3, "parallel": 6, "mesh config": 1, "mesh": 3}.items():
        open_search(page)
        page.keyboard.type(words)
        found = page.get_by_role("option")
        found.filter(has_text="Parallel GPUs (Mesh Config)").first.wait_for()
        listed = [option.split("\n")[0] for option in found.all_inner_texts()]
        assert "Parallel GPUs (Mesh Config)" in listed[:place], (words, listed[:place])
        page.keyboard.press("Escape")
        found.first.wait_for(state="detached")
