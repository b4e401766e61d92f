"""A pack and its version, as errors name them."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "nodes" / "hung" / "pack_version.py"


def loaded(name: str, file: Path) -> Any:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("project", "told"), [('name = "some-pack"\nversion = "1.2.3"\n', "some-pack 1.2.3"), (None, "some_folder")]
)
def test_it_is_the_packs_own_and_not_what_lies_around_it(
    project: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "ComfyUI"\nversion = "0.33.0"\n')
    folder = tmp_path / "custom_nodes" / "some_folder"
    (folder / "src" / "inner").mkdir(parents=True)
    for package in (folder, folder / "src", folder / "src" / "inner"):
        (package / "__init__.py").write_text("")
    if project is not None:
        (folder / "pyproject.toml").write_text(f"[project]\n{project}")
    (folder / "src" / "inner" / "nodes.py").write_text("def patch(): ...\n")
    nodes = loaded("some_folder.src.inner.nodes", folder / "src" / "inner" / "nodes.py")
    monkeypatch.setitem(sys.modules, nodes.__name__, nodes)
    assert loaded("pack_version", FILE).pack_and_version(nodes.patch) == told
