"""A run of twins.py: local MODELs beside their parallel twins, in one process of a real ComfyUI."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from parallel_backend import Backend

from .installation import HERE, ComfyInstallation

Outcomes = dict[str, dict[str, dict[str, Any]]]


def run_twins(
    comfy: ComfyInstallation, backend: Backend, folder: Path, *cases: str, seconds: int, **environment: str
) -> Outcomes:
    """What came of these modules' cases, by model and case; the backend holds nothing afterwards.

    Args:
        folder: of the models' files. environment: what the cases read there.
    """
    command = [comfy.python, HERE / "twins.py", comfy.folder, HERE.parents[1], backend.spec.name, folder, *cases]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE)} | environment,
    )
    backend.unload()  # nobody else asks for these
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
