"""A run of twins.py: local MODELs beside their parallel twins, in one process of a real ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel_backend import Backend

from .core_run import run_script
from .installation import HERE, ComfyInstallation

Outcomes = dict[str, dict[str, dict[str, Any]]]


def run_twins(
    comfy: ComfyInstallation, backend: Backend, folder: Path, *cases: str, seconds: int, **environment: str
) -> Outcomes:
    """What came of these modules' cases, by model and case; the backend holds nothing afterwards.

    Args:
        folder: of the models' files. environment: what the cases read there.
    """
    arguments = (HERE.parents[1], backend.spec.name, folder, *cases)
    printed = run_script(comfy, "twins.py", *arguments, seconds=seconds, **environment)
    backend.unload()  # nobody else asks for these
    return json.loads(printed.splitlines()[-1])
