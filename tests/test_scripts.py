"""What scripts/setup_environment asks of pip, seen by a stand-in for the Python in .venv."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# It keeps what it was called with, and has what it was asked to install: torch's version stands in a file beside it.
PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")
case "$*" in
    "-m pip --version") ;;
    "-c "*torch) [ -f "$here/torch" ] && cat "$here/torch" ;;
    "-m pip index versions torch") cat "$here/versions" ;;
    "-m pip install "*)
        echo "$*" | sed 's/.*--disable-pip-version-check //' >>"$here/installed"
        case "$*" in *torch==*) echo "$*" | sed 's/.*torch==//' >"$here/torch" ;; *--target*) exit 1 ;; esac ;;
    *) echo "not expected: $*" >&2; exit 1 ;;
esac
"""
HAS_GPU = Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
TORCH = "torch==2.13.0" if HAS_GPU else "torch==2.13.0+cpu"
PACK = "--constraint .venv/constraints.txt --editable ."


class Clone:
    """A clone with nothing but the script, and a .venv that only seems to be one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / ".venv" / "bin"
        (folder / "scripts").mkdir(parents=True)
        self.bin.mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "setup_environment", folder / "scripts")
        (folder / "pyproject.toml").write_text("[project]\n")
        (self.bin / "python").write_text(PYTHON)
        (self.bin / "python").chmod(0o755)
        (self.bin / "versions").write_text("Available versions: 2.15.0, 2.13.0+cpu, 2.13.0\n")

    def set_up(self, *extra: str) -> list[str]:
        """What was installed, call by call."""
        log = self.bin / "installed"
        log.write_text("")
        command = [self.folder / "scripts" / "setup_environment", *extra]
        self.said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return log.read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


def test_torch_comes_first_and_alone_and_nothing_may_replace_it(clone: Clone) -> None:
    assert clone.set_up() == [TORCH, PACK]
    assert (clone.folder / ".venv" / "constraints.txt").read_text() == f"{TORCH}\n"


def test_nothing_is_looked_up_until_pyproject_changes(clone: Clone) -> None:
    clone.set_up()
    assert clone.set_up() == []
    assert clone.set_up("test") == [f"{PACK}[test]"]
    assert clone.set_up("test") == clone.set_up() == []
    (clone.folder / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert clone.set_up() == [PACK]


def test_what_the_tests_need_is_enough_for_the_demo(clone: Clone) -> None:
    clone.set_up("test")
    assert clone.set_up() == []


def test_an_own_torch_is_kept(clone: Clone) -> None:
    (clone.bin / "torch").write_text("2.9.1+rocm6\n")
    assert clone.set_up() == [PACK]
    assert (clone.folder / ".venv" / "constraints.txt").read_text() == "torch==2.9.1+rocm6\n"


def test_an_environment_that_is_a_link_is_left_alone(clone: Clone) -> None:
    own = clone.folder.parent / "own"
    shutil.move(clone.folder / ".venv", own)
    (clone.folder / ".venv").symlink_to(own)
    assert clone.set_up() == []


@pytest.mark.skipif(HAS_GPU, reason="a machine with a GPU takes pip's own build")
def test_without_a_cpu_build_in_reach_pips_own_is_taken_and_said_so(clone: Clone) -> None:
    (clone.bin / "versions").write_text("Available versions: 2.15.0, 2.13.0\n")
    uv, torch, pack = clone.set_up()
    assert uv.startswith("--target") and uv.endswith(" uv") and (torch, pack) == ("torch==2.13.0", PACK)
    assert "can't be reached" in clone.said
