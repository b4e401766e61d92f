"""Triton's kernels on a machine without a GPU, by Triton's own interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from parallel_backend.fused.operation import Fused

ROOT = Path(__file__).parents[1]


def interpreted(cases: Sequence[tuple[Fused, Sequence[Any]]]) -> list[Any]:
    """What each kernel gives for its arguments; of one that writes where it is told, that last argument."""
    if find_spec("triton") is None:
        pytest.skip("no Triton on this machine")
    with TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.pt", Path(folder) / "found.pt"
        modules = [fused.launch.__module__ for fused, _ in cases]
        names = [fused.name for fused, _ in cases]
        torch.save((modules, names, [list(arguments) for _, arguments in cases]), given)
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, str(given), str(found)]
        subprocess.run(command, check=True, env=environment, cwd=folder, stderr=subprocess.PIPE)
        return torch.load(found)


def _main(given: str, found: str) -> None:
    results = []
    for module, name, arguments in zip(*torch.load(given), strict=True):
        (fused,) = [x for x in vars(import_module(module)).values() if isinstance(x, Fused) and x.name == name]
        result = fused.launch(*arguments)
        results.append(arguments[-1] if result is None else result)
    torch.save(results, found)


if __name__ == "__main__":
    _main(*sys.argv[1:])
