"""Cores older than the newest: what they do not take is left out, in one place."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

NODES = Path(__file__).parents[1] / "nodes"


class Older:
    """Takes what every core has."""

    def __init__(self, name: str = "", tooltip: str = "") -> None:
        self.name, self.tooltip = name, tooltip


class Newer(Older):
    def __init__(self, name: str = "", search_aliases: Any = None, advanced: Any = None) -> None:
        super().__init__(name)
        self.search_aliases, self.advanced = search_aliases, advanced


@pytest.mark.parametrize(("core", "more"), [(Older, False), (Newer, True)])
def test_a_core_is_told_what_it_knows(core: type, more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    latest = ModuleType("comfy_api.latest")
    latest.io = SimpleNamespace(Schema=core, Int=SimpleNamespace(Input=core))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    ours = runpy.run_path(str(NODES / "known_to_core.py"))
    made = vars(core("node", **ours["search_aliases"]("one", "two"), **ours["ADVANCED"]))
    told = {"search_aliases": ["one", "two"], "advanced": True} if more else {}
    assert made == {"name": "node", "tooltip": "", **told}


def test_no_node_tells_a_core_of_them_itself() -> None:
    for file in NODES.glob("*.py"):
        if file.name != "known_to_core.py":
            assert not re.search(r"\b(search_aliases|advanced)=", file.read_text()), file.name
