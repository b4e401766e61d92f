"""Where ranks share a GPU with ComfyUI: its own models leave when the backend needs their room, and the node says so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import HERE, ComfyInstallation

BOTH = {"said": "", "loaded": ["Held", "ModelPatcher"]}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, models: Path) -> dict[str, Any]:
    model = models / "diffusion_models" / "sd3.5-medium.safetensors"
    command = [comfy.python, HERE / "room.py", comfy.folder, HERE.parents[1], model]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_comfyuis_own_models_leave_when_a_rank_lacks_room_and_only_then(outcomes: dict[str, Any]) -> None:
    rooms = dict(outcomes["rooms"])
    short = rooms.pop("short")
    assert len(rooms) == 5 and all(room == BOTH for room in rooms.values()), rooms
    assert short["loaded"] == ["Held"], "what a backend holds is not ComfyUI's own"
    assert "11776 MiB are needed for rank 3 on cuda:0 (2048 MiB free)" in short["said"]


def test_a_request_without_memory_is_made_again_once_comfyuis_own_models_have_left(outcomes: dict[str, Any]) -> None:
    assert outcomes["again"] == {"said": "done", "held": [2, 1]}
    assert outcomes["in vain"] == {"held": [1]}, "nothing was left to make room with"


def test_comfyui_counts_weights_in_a_backend_once_and_asks_them_to_leave_once(outcomes: dict[str, Any]) -> None:
    assert outcomes["counted"] == [1, 100] and outcomes["beside"]
    assert outcomes["loads"] == [], "a backend that has just loaded them is not asked to"
    assert outcomes["events"] == ["a leaves", "a is back"]
