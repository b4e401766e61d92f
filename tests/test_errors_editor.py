"""What a person sees in ComfyUI's editor of a node that fails: a short type, what helps before all else, no stale success."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from comfyui.editor_page import EditorPage
from ui_workflow import template

pytestmark = pytest.mark.usefixtures("default_backend")
# In the page: the first node of that type, its text, a widget of its.
NODE = "(type) => window.app.graph.nodes.find((node) => node.type === type)"
TEXT = f"(type) => ({NODE})(type).widgets.find((widget) => widget.name === '$$node-text-preview')?.value ?? ''"
SET = f"([type, name, value]) => {{ ({NODE})(type).widgets.find((widget) => widget.name === name).value = value; }}"
REFUSED = "sd3.5-medium has displaced steps on two or more pp or ring ranks"
REMEDY = "Set pp or ring in Mesh Config, or leave displaced off."


@pytest.fixture
def demo(kept_editor: EditorPage) -> EditorPage:
    """With the demo's workflow, and a seed of which ComfyUI has no picture yet."""
    editor = kept_editor
    editor.load_workflow(json.loads(template("demo_text_to_image").path.read_text()))
    set_widget(editor, "ParallelSampler", "seed", random.getrandbits(32))
    return editor


def text_on(editor: EditorPage, node_type: str) -> str:
    return editor.page.evaluate(TEXT, node_type)


def set_widget(editor: EditorPage, node_type: str, name: str, value: Any) -> None:
    editor.page.evaluate(SET, [node_type, name, value])


def test_a_failure_takes_the_place_of_a_success_and_a_success_that_of_a_failure(
    demo: EditorPage, tmp_path: Path
) -> None:
    set_widget(demo, "ParallelSampler", "steps", 2)
    set_widget(demo, "ParallelSampler", "warmup_steps", 0)
    assert demo.run()["kind"] == "execution_success"
    assert text_on(demo, "ParallelSampler").startswith("2 steps, ")

    set_widget(demo, "ParallelSampler", "displaced", True)
    failed = demo.run()
    assert (failed["kind"], failed["exception_type"]) == ("execution_error", "parallel_mmdit.UnsupportedError")
    said = text_on(demo, "ParallelSampler")
    assert said.startswith("Failed: ") and REFUSED in said and said.endswith(REMEDY)
    demo.page.get_by_text("View details").first.click()
    report = demo.page.get_by_text("ComfyUI Error Report").first.inner_text()
    first_lines = report.partition("Stack Trace")[0]
    assert (
        "parallel_mmdit.UnsupportedError" in first_lines and REMEDY in first_lines and "custom_nodes" not in first_lines
    )
    assert demo.screenshot(tmp_path / "failed.png").stat().st_size > 10_000

    set_widget(demo, "ParallelSampler", "displaced", False)
    set_widget(demo, "ParallelSampler", "steps", 3)
    assert demo.run()["kind"] == "execution_success"
    assert text_on(demo, "ParallelSampler").startswith("3 steps, ")


@pytest.mark.parametrize("again", ["a caption that is new", "one that ComfyUI has the result of"])
def test_a_node_that_has_nothing_to_tell_does_not_keep_a_failure(demo: EditorPage, again: str) -> None:
    set_widget(demo, "ParallelSampler", "steps", 1)
    good = f"a {random.choice(['red', 'blue'])} circle on a {random.choice(['black', 'white', 'green'])} background"
    set_widget(demo, "DemoCaption", "caption", good)
    if again.startswith("one"):
        assert demo.run()["kind"] == "execution_success" and text_on(demo, "DemoCaption") == ""
    set_widget(demo, "DemoCaption", "caption", "a plaid circle on a blue background")
    assert demo.run()["exception_type"] == "parallel_mmdit.InputError"
    assert text_on(demo, "DemoCaption").startswith("Failed: The demo's captions have no word 'plaid'. Its words are: ")
    set_widget(demo, "DemoCaption", "caption", good)
    assert demo.run()["kind"] == "execution_success"
    assert text_on(demo, "DemoCaption") == "done"


def test_degrees_that_don_t_fit_are_said_on_mesh_config_before_anything_runs(demo: EditorPage) -> None:
    set_widget(demo, "MeshConfig", "ulysses", 3)
    demo.queue()
    # By ComfyUI's own words: Mesh Config's card on the node says the rest of them too.
    said = demo.page.get_by_text("couldn't validate mesh").first.inner_text()
    assert "but the backend has 2 ranks" in said and "Choose degrees whose product is" in said
