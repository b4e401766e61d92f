"""The editor's page as other tests use it."""

from __future__ import annotations

import json
from pathlib import Path

from comfyui.editor_page import EditorPage
from ui_workflow import template


def test_the_demo_is_opened_run_and_seen(editor: EditorPage, default_backend: str, tmp_path: Path) -> None:
    editor.load_workflow(json.loads(template("demo_text_to_image").path.read_text()))
    assert editor.run()["kind"] == "execution_success"
    is_vue = editor.page.locator("[data-node-id]").count() > 0
    assert is_vue == (editor.variant == "nodes2")
    assert editor.screenshot(tmp_path / "editor.png").stat().st_size > 10_000
    assert not editor.errors, editor.errors
