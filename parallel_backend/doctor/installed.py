"""Packages in this Python: those that this pack needs, and what others ask of the same."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import torch
from packaging.requirements import Requirement

from ..client.clashes import clashes
from ..client.requirements import COMMANDS_NEED, FILES_NEED, RANKS_NEED, pip_install, shortfall
from ..version import __version__
from .finding import Finding

OPTIONAL = {
    "flash-attn": "attention kernel 'flash'; torch's own is as fast",
    "prometheus-client": "serve --metrics-port",
}


def versions() -> Iterator[Finding]:
    yield Finding("ok", f"parallel-mmdit {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    found = []
    for requirement in (*RANKS_NEED, *COMMANDS_NEED, *FILES_NEED):
        if short := shortfall(requirement):
            yield Finding("wrong", f"parallel-mmdit {short.what}", short.remedy)
        else:
            found.append(_named(Requirement(requirement).name))
    for name, use in OPTIONAL.items():
        try:
            found.append(_named(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding("note", f"{name} is not installed: no {use}", f"{pip_install(name)}, if you want it")
    yield Finding("ok", ", ".join(found))
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        yield Finding(
            "wrong", "this torch was built without torch.distributed or gloo", "Install torch from pytorch.org."
        )


def _named(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def clashing() -> Iterator[Finding]:
    """Requirements on what this pack and others share that the installed versions don't meet."""
    for clash in clashes():
        yield Finding("wrong" if clash.is_ours else "note", clash.what, clash.remedy)
