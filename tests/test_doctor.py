"""The doctor's page on made-up installations: ComfyUIs, packages and packs that stand in each other's way, machines without GPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from parallel_backend.__main__ import main
from parallel_backend.client import cards, requirements
from parallel_backend.doctor import as_text, comfyui, examine, installed, machine, page
from parallel_backend.doctor.finding import Finding
from parallel_backend.errors import StartError


def write_distribution(site: Path, name: str, version: str, *requires: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def write_comfyui(folder: Path, version: str) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfyui_version.py").write_text(f'# made by a script\n__version__ = "{version}"\n')
    return folder


def write_pack(packs: Path, name: str, *requires: str) -> Path:
    (packs / name / "parallel_backend").mkdir(parents=True)
    if requires:
        (packs / name / "requirements.txt").write_text("\n".join(requires) + "\n")
    return packs / name


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This pack in the custom_nodes of a ComfyUI of today, with nothing else in it."""
    folder = write_pack(write_comfyui(tmp_path / "ComfyUI", "0.33.0") / "custom_nodes", "parallel-mmdit")
    (folder / "parallel_backend" / "version.py").touch()
    for module in (requirements, comfyui):
        monkeypatch.setattr(module, "PACK", folder)
    monkeypatch.delenv(comfyui.VARIABLE, raising=False)
    monkeypatch.setattr(comfyui, "_USUAL", tmp_path / "nowhere")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages there go before those that are installed."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The links, which test_links proves, are left out."""
    monkeypatch.setattr("parallel_backend.doctor.links.prove_links", lambda spec: [])


def told(part: Callable[[], object], verdict: str) -> list[Finding]:
    return [finding for finding in part() if finding.verdict == verdict]  # type: ignore[attr-defined]


def test_a_comfyui_that_is_new_enough_is_named_with_its_editor(pack: Path, site: Path) -> None:
    write_distribution(site, "comfyui-frontend-package", "1.49.6")
    whats = [finding.what for finding in told(comfyui.comfyui, "ok")]
    assert whats == [f"ComfyUI 0.33.0 at {pack.parents[1]}", "comfyui-frontend-package 1.49.6"]
    assert not told(comfyui.comfyui, "wrong") and not told(comfyui.comfyui, "note")


def test_one_that_is_too_old_is_wrong_and_has_one_command(pack: Path, site: Path) -> None:
    root = pack.parents[1]
    (root / "comfyui_version.py").write_text('__version__ = "0.7.9"\n')
    write_distribution(site, "comfyui-frontend-package", "1.20.1")
    core, editor = told(comfyui.comfyui, "wrong")
    assert core.what == f"parallel-mmdit needs ComfyUI>=0.8.0, found 0.7.9 at {root}"
    assert core.remedy == f"git -C {root} pull && {sys.executable} -m pip install -r {root}/requirements.txt"
    assert editor.what == "parallel-mmdit needs comfyui-frontend-package>=1.30, found 1.20.1"
    assert editor.remedy == f"{sys.executable} -m pip install -r {root}/requirements.txt"


def test_another_python_is_named_with_the_command_that_examines_it(pack: Path) -> None:
    root = pack.parents[1]
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").touch()
    write_distribution(root / ".venv" / "lib" / "python3.12" / "site-packages", "torch", "2.9.1+cu130")
    write_distribution(root / ".venv" / "lib" / "python3.12" / "site-packages", "comfyui-frontend-package", "1.29.0")
    (note,) = told(comfyui.comfyui, "note")
    assert f"{root}/.venv/bin/python (torch 2.9.1+cu130)" in note.what and torch.__version__ in note.what
    assert note.remedy.endswith(f"cd {pack} && {root}/.venv/bin/python -m parallel_backend doctor")
    (wrong,) = told(comfyui.comfyui, "wrong")
    assert "found 1.29.0" in wrong.what and wrong.remedy.startswith(f"{root}/.venv/bin/python -m pip install -r")


def test_a_pack_that_is_there_twice_is_wrong(pack: Path) -> None:
    second = write_pack(pack.parent, "parallel-mmdit-main")
    (second / "parallel_backend" / "version.py").touch()
    (wrong,) = told(comfyui.comfyui, "wrong")
    assert "has this pack 2 times: parallel-mmdit, parallel-mmdit-main" in wrong.what
    assert wrong.remedy == f"mv {second} {second}.disabled"


def test_without_a_comfyui_nothing_is_wrong(tmp_path: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfyui, "PACK", tmp_path / "elsewhere" / "parallel-mmdit")
    monkeypatch.setenv(comfyui.VARIABLE, str(tmp_path))
    first, second = told(comfyui.comfyui, "note")
    assert first.what == f"COMFYUI_PATH={tmp_path} is no ComfyUI" and second.what.startswith("no ComfyUI was found")
    monkeypatch.setenv(comfyui.VARIABLE, str(pack.parents[1]))
    assert comfyui.find_comfyui() == pack.parents[1] and not told(comfyui.comfyui, "wrong")


def test_pins_of_other_packs_are_notes_with_what_suits_both(pack: Path, site: Path) -> None:
    write_distribution(site, "diffusers", "0.42.0", "huggingface-hub>=0.34")
    write_distribution(site, "huggingface-hub", "0.36.0")
    write_pack(pack.parent, "older", "diffusers<=0.38  # newer ones break it", "huggingface_hub>=0.30", "somewhere==1")
    write_pack(pack.parent, "oldest", "diffusers==0.30.0")
    found = {finding.what: finding for finding in installed.clashing() if "custom_nodes/" in finding.what}
    suits, suits_not = (
        found[f"custom_nodes/{line}, found 0.42.0"]
        for line in ("older asks for diffusers<=0.38", "oldest asks for diffusers==0.30.0")
    )
    assert len(found) == 2 and {finding.verdict for finding in found.values()} == {"note"}
    ours = next(line for line in requirements.RANKS_NEED if line.startswith("diffusers"))
    assert suits.remedy.startswith(f"{sys.executable} -m pip install 'diffusers") and "<=0.38" in suits.remedy
    assert all(bound in suits.remedy for bound in ours.removeprefix("diffusers").split(","))
    assert "No version suits both" in suits_not.remedy and "0.36" in suits_not.remedy


def test_what_our_own_packages_lack_is_wrong(pack: Path, site: Path) -> None:
    write_distribution(
        site, "diffusers", "0.42.0", "huggingface-hub>=0.34", "no-such-package>=2", "torch; extra == 'x'"
    )
    write_distribution(site, "huggingface-hub", "0.20.3")
    found = {finding.what: finding for finding in told(installed.clashing, "wrong")}
    hub = found["diffusers 0.42.0 asks for huggingface-hub>=0.34, found 0.20.3"]
    assert hub.remedy.startswith(f"{sys.executable} -m pip install 'huggingface-hub>=0.34")
    assert found["diffusers 0.42.0 asks for no-such-package>=2, found none"].remedy.endswith("'no-such-package>=2'")


@pytest.mark.parametrize(
    ("there", "visible", "verdict"), [(None, None, "note"), (4, None, "wrong"), (4, "", "note")], ids=str
)
def test_a_cuda_torch_without_a_gpu_is_wrong_only_where_there_is_one(
    there: int | None, visible: str | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "present", lambda: there)
    monkeypatch.setattr(machine, "seen", lambda: cards.Seen((), visible, there))
    (found,) = [finding for finding in machine.devices() if "built for CUDA 12.8" in finding.what]
    assert found.verdict == verdict and "nvidia-smi" in found.remedy


def test_fixes_come_first_in_order_then_notes_and_the_exit_status_says_whether_any(
    pack: Path, site: Path, no_ranks: None, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nothing is wrong"

    (pack.parents[1] / "comfyui_version.py").write_text('__version__ = "0.7.9"\n')
    write_distribution(site, "diffusers", "0.30.0")
    monkeypatch.setenv("PARALLEL_MMDIT_RUNTIME_DIR", str(pack / "requirements.txt" / "below"))
    (pack / "requirements.txt").touch()
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 wrong; put right in this order:"
    assert lines[1].startswith("1.     parallel-mmdit needs ComfyUI>=0.8.0") and lines[2].startswith(
        "       -> git -C "
    )
    assert lines[3].startswith("2.     parallel-mmdit needs diffusers") and " -m pip install " in lines[4]
    assert lines[5].startswith("3.     no backend can be started or found: ")
    marks = [line[:7].strip() for line in lines[1:] if line[:7].strip()]
    notes = marks.index("note")
    assert marks[:3] == ["1.", "2.", "3."] and set(marks[marks.index("ok") :]) == {"ok"} and notes == 3
    assert any("links between ranks were not tried" in line for line in lines)


def test_details_stand_below_the_remedy() -> None:
    text = as_text([Finding("wrong", "it is broken", "mend it", "first\nsecond"), Finding("ok", "the rest")])
    assert text.splitlines()[1:] == [
        "1.     it is broken",
        "       -> mend it",
        "          first",
        "          second",
        "ok     the rest",
    ]


def test_the_pages_order_is_that_of_the_verdicts(no_ranks: None, runtime_folder: Path) -> None:
    verdicts = [finding.verdict for finding in examine()]
    assert verdicts == sorted(verdicts, key=page.ORDER.index) and "ok" in verdicts


def test_a_comfyui_that_is_too_old_is_named_before_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    core = ModuleType("comfyui_version")
    core.__version__ = "0.7.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfyui_version", core)
    with pytest.raises(StartError) as caught:
        requirements.check_installed()
    assert caught.value.message == "parallel-mmdit needs ComfyUI>=0.8.0, found 0.7.0."
    core.__version__ = "0.8.0"  # type: ignore[attr-defined]
    requirements.check_installed()
