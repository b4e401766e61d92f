"""Runs reference.py in ComfyUI's own environment, and reads what it wrote."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .installation import HERE, ComfyInstallation


def ksampler_latents(
    comfy: ComfyInstallation, model: Path, inputs: dict[str, Tensor], cases: Mapping[str, Any], folder: Path
) -> dict[str, Tensor]:
    """KSampler's latent for each case, and `sigmas/SCHEDULER/STEPS`."""
    given, results = folder / "cases.safetensors", folder / "out.safetensors"
    save_file(inputs, given, metadata={"cases": json.dumps(cases)})
    command = [comfy.python, HERE / "reference.py", comfy.folder, model, given, results]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(results)
