"""What ComfyUI's registry, its manager and pip see of this pack."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pathspec import PathSpec
from PIL import Image

from parallel_backend.demo.files import FILES
from parallel_backend.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MOST_BYTES = 5_000_000
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RAW = "https://raw.githubusercontent.com/parallel-mmdit/parallel-mmdit/main/"


def patterns(name: str) -> PathSpec:
    return PathSpec.from_lines("gitignore", (ROOT / name).read_text().splitlines())


def tracked() -> Iterator[str]:
    """Files that git would track, also where there is no git: CI's copy has none."""
    ignored = patterns(".gitignore")
    for folder, below, names in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        below[:] = [name for name in below if name != ".git" and not ignored.match_file(f"{inside / name}/")]
        yield from (str(inside / name) for name in names if not ignored.match_file(str(inside / name)))


@pytest.fixture(scope="module")
def packed() -> set[str]:
    """What `comfy node pack` would take."""
    left_out = patterns(".comfyignore")
    return {name for name in tracked() if not left_out.match_file(name)}


def test_versions_agree() -> None:
    assert PYPROJECT["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_what_the_registry_installs_is_small_and_has_all_that_runs(packed: set[str]) -> None:
    assert sum((ROOT / name).stat().st_size for name in packed) <= MOST_BYTES
    needed = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"}
    for folder, ending in (
        ("nodes", "*"),
        ("parallel_backend", "*.py"),
        ("parallel_training", "*.py"),
        ("workflows", "*"),
    ):
        found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob(ending))
        # Notes are in the templates already.
        needed |= {
            str(path) for path in found if (ROOT / path).is_file() and not {"__pycache__", "notes"} & {*path.parts}
        }
    assert needed <= packed
    assert not any(name.endswith((".safetensors", ".png")) or name.startswith("tests") for name in packed)


def test_links_and_pictures_are_there() -> None:
    assert {"Repository", "Documentation", "Bug Tracker", "Changelog"} <= PYPROJECT["project"]["urls"].keys()
    shapes = {}
    for word in ("Icon", "Banner"):
        url = PYPROJECT["tool"]["comfy"][word]
        assert url.startswith(RAW)
        shapes[word] = Image.open(ROOT / url.removeprefix(RAW)).size
    assert shapes == {"Icon": (400, 400), "Banner": (1260, 540)}


# ruff's rules that `comfy node validate` runs.
def test_nothing_runs_text_as_code() -> None:
    command = [sys.executable, "-m", "ruff", "check", ".", "--isolated", "--select", "S102,S307,E702", "--no-cache"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_release_has_each_file_of_the_demo_under_its_own_name() -> None:
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text()
    assert "parallel_backend/demo/models/*/parallel_demo/*.safetensors" in workflow
    found = [path.name for path in ROOT.glob("parallel_backend/demo/models/*/parallel_demo/*.safetensors")]
    assert sorted(found) == sorted(FILES)
