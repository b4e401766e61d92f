"""The workflows as ComfyUI's template browser and its editor show them, in a real browser."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from comfyui.editor_page import VARIANTS, EditorPage, OpenEditor, Variant
from comfyui.server import ComfyServer
from PIL import Image
from ui_workflow import NOTE, NOTES, WORKFLOWS, Template, template, templates

PACK = "parallel-mmdit"
MOST_BYTES = 20_000
BOXES = """() => window.app.graph.nodes.map((node) => {
    node.updateArea?.();
    const [x, y, width, height] = node.boundingRect ?? node.getBounding();
    const shown = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
    const tall = (shown?.height ?? 0) / window.app.canvas.ds.scale;
    return { title: node.title, x, y, right: x + width, bottom: y + Math.max(height, tall) };
})"""
# What stands beside each button: a file's name and its folder.
OFFERED = """() => [...document.querySelectorAll("button")].filter((button) => button.innerText.trim() === "Download")
    .map((button) => {
        let row = button;
        while (!row.innerText.includes(".safetensors")) row = row.parentElement;
        return row.innerText;
    })"""
CAPTIONS = """() => window.app.graph.nodes.filter((node) => node.type === "DemoCaption")
    .map((node) => node.widgets.find((widget) => widget.name === "caption").value)"""


@pytest.fixture(scope="module")
def files(server: ComfyServer, workflow_models: Path) -> Path:
    """The folder of models with all that the workflows name; a picture to load."""
    Image.new("RGB", (64, 64)).save(server.base / "input" / "example.png")
    return workflow_models


def test_each_workflow_has_a_note_a_title_and_a_picture() -> None:
    found = templates()
    assert found and {t.path.name for t in found} == {path.name for path in WORKFLOWS.glob("*.json")}
    assert {t.thumbnail.name for t in found} == {path.name for path in WORKFLOWS.glob("*.jpg")}
    assert {f"{t.name}.md" for t in found} == {path.name for path in NOTES.glob("*.md")}
    assert all(part in t.text for t in found for part in ("**Shows**", "**Change first**", "**Size**"))


def test_the_browser_gets_all_titles_and_small_pictures(server: ComfyServer) -> None:
    assert sorted(server.get("/workflow_templates")[PACK]) == [t.title for t in templates()]
    for t in templates():
        url = f"http://127.0.0.1:{server.port}/api/workflow_templates/{PACK}/{quote(t.title)}.jpg"
        with urllib.request.urlopen(url) as answer:
            picture = answer.read()
            assert answer.status == 200 and answer.headers["Content-Type"] == "image/jpeg"
        assert len(picture) <= MOST_BYTES and Image.open(io.BytesIO(picture)).size == (400, 400)


def test_nodes_keep_the_names_by_which_they_are_found(server: ComfyServer) -> None:
    known = server.get("/object_info")
    own = [n for t in templates() for n in t.prompt.values() if is_own(known[n["class_type"]])]
    assert own
    for node in own:
        name = known[node["class_type"]]["display_name"]
        assert node["_meta"]["title"].partition(": ")[0] == name


def is_own(node: dict[str, Any]) -> bool:
    return str(node["python_module"]).endswith(PACK)


def test_files_are_named_with_their_folder_and_place() -> None:
    named = set()
    for t in templates():
        for node in json.loads(t.path.read_text())["nodes"]:
            for model in node["properties"].get("models", []):
                assert model["name"] in node["widgets_values"] and model["directory"]
                # The hosts from which the editor offers to download, and the endings.
                assert model["url"].startswith("https://huggingface.co/") and model["name"].endswith(".safetensors")
                assert model["url"].endswith("/" + model["name"].rpartition("/")[2])
                named.add(model["name"].rpartition("/")[2])
    assert named == json.loads((NOTES / "models.json").read_text()).keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_open_as_they_are_meant(variant: Variant, files: Path, open_editor: OpenEditor) -> None:
    editor = open_editor(variant, size=(1600, 1000))
    for t in templates():
        fetched = editor.server.get(f"/api/workflow_templates/{PACK}/{quote(t.title)}.json")
        editor.load_workflow(fetched)
        editor.page.wait_for_timeout(500)
        assert without_overlaps(editor), t.title
        queued = editor.page.evaluate("() => window.app.graphToPrompt()")["output"]
        assert queued == t.prompt
        (note,) = editor.page.evaluate(f"() => window.app.graph.nodes.filter((node) => node.type === '{NOTE}')"
                                       ".map((node) => node.widgets[0].value)")  # fmt: skip
        assert note.startswith(t.text)
        assert editor.page.get_by_text("Missing", exact=False).count() == 0, t.title
        assert editor.page.get_by_text("errors found").count() == 0, t.title
    assert not editor.errors, editor.errors


def without_overlaps(editor: EditorPage) -> bool:
    boxes = editor.page.evaluate(BOXES)
    return not any(
        a["x"] < b["right"] and b["x"] < a["right"] and a["y"] < b["bottom"] and b["y"] < a["bottom"]
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def open_browser(editor: EditorPage) -> None:
    """The template browser on this pack's."""
    editor.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    editor.page.get_by_text(PACK, exact=True).first.click()


def card(t: Template) -> str:
    return f'[data-testid="template-workflow-{t.title}"]'


def test_a_template_is_chosen_in_the_browser_and_says_which_files_are_missing(
    files: Path, open_editor: OpenEditor
) -> None:
    medium = template("sd35_text_to_image")
    missing = [files / "checkpoints" / "sd3.5_medium.safetensors", files / "text_encoders" / "clip_g.safetensors"]
    with taken_away(missing):
        editor = open_editor("classic", size=(1600, 1000))
        open_browser(editor)
        editor.page.wait_for_function(
            "(selector) => document.querySelector(selector)?.naturalWidth === 400", arg=f"{card(medium)} img"
        )
        editor.page.click(card(medium))
        editor.page.get_by_text("View details").first.click()
        editor.page.wait_for_function(f"({OFFERED})().length > 1")
        offered = sorted("".join(text.split()) for text in editor.page.evaluate(OFFERED))
        # 2: the nodes that name it
        medium_offered = "checkpoints/sd3.5_medium.safetensors2checkpointsDownload"
        assert offered == [medium_offered, "clip_g.safetensorstext_encodersDownload"]
    assert not editor.errors, editor.errors


@contextmanager
def taken_away(paths: list[Path]) -> Iterator[None]:
    for path in paths:
        path.rename(path.with_suffix(".away"))
    try:
        yield
    finally:
        for path in paths:
            path.with_suffix(".away").rename(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_second_caption_that_a_person_adds_starts_empty(variant: Variant, open_editor: OpenEditor) -> None:
    editor = open_editor(variant)
    page = editor.page
    page.evaluate("() => window.app.graph.clear()")
    for _ in range(2):
        page.evaluate("() => window.app.graph.add(window.LiteGraph.createNode('DemoCaption'))")
    first, second = page.evaluate(CAPTIONS)
    assert first and second == ""
    page.evaluate("""() => {
        const { canvas, graph } = window.app;
        canvas.selectItems([graph.nodes[0]]);
        canvas.copyToClipboard();
        canvas.pasteFromClipboard();
    }""")
    assert page.evaluate(CAPTIONS) == [first, "", first]
    together = template("demo_image_to_image")
    editor.load_workflow(json.loads(together.path.read_text()))
    captions = [n["inputs"]["caption"] for n in together.prompt.values() if n["class_type"] == "DemoCaption"]
    assert sorted(page.evaluate(CAPTIONS)) == sorted(captions) and all(captions[i] for i in (0, 2))
    editor.load_prompt(together.prompt)
    assert sorted(page.evaluate(CAPTIONS)) == sorted(captions)
    assert not editor.errors, editor.errors
