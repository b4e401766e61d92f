"""ControlNets, T2I-Adapters and Control-LoRAs give one latent on a local MODEL and on its parallel twin."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import HERE, ComfyInstallation

from parallel_backend import Backend
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, models: Path, backend2: Backend) -> Outcomes:
    folder = models / "diffusion_models"
    write_unet(folder / "unet-layers.safetensors", CONFIGS["two layers"], "single file")
    command = [comfy.python, HERE / "twins.py", comfy.folder, HERE.parents[1], backend2.spec.name, folder]
    done = subprocess.run(
        list(map(str, [*command, "control_cases"])),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    backend2.unload()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    wrong = {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}
    assert len(outcomes) > 50 and not wrong, wrong


def test_each_changes_the_latent(outcomes: Outcomes) -> None:
    assert not {name for name, outcome in outcomes.items() if outcome["effect"] < 1e-2}
