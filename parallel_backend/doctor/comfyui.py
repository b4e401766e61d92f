"""The ComfyUI that this pack stands in, or one that is found: its version, its Python, its editor, where the pack is in it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from packaging.requirements import Requirement

from ..client.requirements import COMFYUI_NEEDED, EDITOR_NEEDED, NODE_PACKS, PACK, Shortfall, admits
from .finding import Finding

VARIABLE = "COMFYUI_PATH"
_USUAL = Path("~/comfy/ComfyUI")
_VERSION_FILE = "comfyui_version.py"
_ENVIRONMENTS = (".venv", "venv")


def comfyui() -> Iterator[Finding]:
    chosen = os.environ.get(VARIABLE)
    if chosen and not _is_comfyui(Path(chosen).expanduser()):
        yield Finding("note", f"{VARIABLE}={chosen} is no ComfyUI", f"Set {VARIABLE} to ComfyUI's own folder.")
    folder = find_comfyui()
    if folder is None:
        what = f"no ComfyUI was found: this pack is in no {NODE_PACKS}, nor is one at {_USUAL}"
        yield Finding("note", what, f"For the nodes, set {VARIABLE} to its folder; Python and serve need none.")
        return
    version = core_version(folder)
    if version is not None and not admits(Requirement(COMFYUI_NEEDED), version):
        short = Shortfall(COMFYUI_NEEDED, version)
        yield Finding("wrong", f"parallel-mmdit {short.what} at {folder}", _update(folder))
    else:
        yield Finding("ok", f"ComfyUI {version or 'of unknown version'} at {folder}")
    yield from _python(folder)
    yield from _editor(folder)
    yield from _place(folder)


def find_comfyui() -> Path | None:
    """The one that runs in this process, else that around this pack, $COMFYUI_PATH, or at comfy-cli's place."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    places = [Path(program).absolute().parent] if program else []
    places += [PACK.parents[1]] if PACK.parent.name == NODE_PACKS else []
    places += [Path(chosen)] if (chosen := os.environ.get(VARIABLE)) else []
    return next(filter(_is_comfyui, (place.expanduser() for place in (*places, _USUAL))), None)


def _is_comfyui(folder: Path) -> bool:
    return (folder / _VERSION_FILE).is_file() and (folder / "comfy").is_dir()


def core_version(folder: Path) -> str | None:
    found = re.search(r"__version__\s*=\s*['\"]([\d.]+)", (folder / _VERSION_FILE).read_text(errors="replace"))
    return found[1] if found else None


def _own_environment(folder: Path) -> Path | None:
    """The virtual environment in ComfyUI's folder, if it has one."""
    return next((folder / name for name in _ENVIRONMENTS if (folder / name / "bin" / "python").is_file()), None)


def _is_this(environment: Path | None) -> bool:
    """Without one of its own, ComfyUI's Python isn't known: it is taken for the one that doctor is run with."""
    return environment is None or environment.resolve() == Path(sys.prefix).resolve()


def _pythons_path(environment: Path) -> Path:
    return environment / "bin" / "python"


def _site(environment: Path | None) -> Sequence[str]:
    if _is_this(environment) or environment is None:
        return sys.path
    return [str(site) for site in environment.glob("lib/python*/site-packages")]


def _version_in(site: Sequence[str], name: str) -> str | None:
    return next((found.version for found in importlib.metadata.distributions(name=name, path=list(site))), None)


def _python(folder: Path) -> Iterator[Finding]:
    environment = _own_environment(folder)
    if environment is None or _is_this(environment):
        return
    python, theirs = _pythons_path(environment), _version_in(_site(environment), "torch")
    what = f"ComfyUI runs with {python} (torch {theirs or 'not installed'}), doctor with {sys.executable} (torch {torch.__version__})"
    command = f"cd {shlex.quote(str(PACK))} && {shlex.quote(str(python))} -m parallel_backend doctor"
    yield Finding("note", f"{what}: the packages named below are the latter's", f"Run doctor with ComfyUI's: {command}")


def _editor(folder: Path) -> Iterator[Finding]:
    wanted = Requirement(EDITOR_NEEDED)
    version = _version_in(_site(_own_environment(folder)), wanted.name)
    if version is None:
        yield Finding("note", f"{wanted.name} is not installed: ComfyUI has its HTTP API, and no editor")
    elif not admits(wanted, version):
        short = Shortfall(EDITOR_NEEDED, version)
        yield Finding("wrong", f"parallel-mmdit {short.what}", _install(folder))
    else:
        yield Finding("ok", f"{wanted.name} {version}")


def _install(folder: Path) -> str:
    """The command that installs what this ComfyUI asks for, its editor too."""
    environment = _own_environment(folder)
    python = sys.executable if environment is None else str(_pythons_path(environment))
    return f"{shlex.quote(python)} -m pip install -r {shlex.quote(str(folder / 'requirements.txt'))}"


def _update(folder: Path) -> str:
    return f"git -C {shlex.quote(str(folder))} pull && {_install(folder)}"


def _place(folder: Path) -> Iterator[Finding]:
    """Whether this pack is in ComfyUI's folder of packs, and once."""
    packs = PACK.parent if PACK.parent.name == NODE_PACKS else folder / NODE_PACKS
    copies = [path.parents[1] for path in sorted(packs.glob("*/parallel_backend/version.py"))]
    if len(copies) > 1:
        names = ", ".join(path.name for path in copies)
        others = [path for path in copies if path.resolve() != PACK.resolve()]
        moved = shlex.quote(str(others[0]))
        yield Finding("wrong", f"{packs} has this pack {len(copies)} times: {names}", f"mv {moved} {moved}.disabled")
    elif not copies:
        link = f"ln -s {shlex.quote(str(PACK))} {shlex.quote(str(packs / 'parallel-mmdit'))}"
        yield Finding("note", f"this pack is not in {packs}", f"For its nodes in that ComfyUI: {link}")
