"""Where ranks share a GPU with ComfyUI: its own models leave when the backend needs their room, and the node says so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from comfyui.installation import HERE, ComfyInstallation


def test_comfyuis_models_leave_when_a_rank_lacks_room_and_only_then(comfy: ComfyInstallation, models: Path) -> None:
    model = models / "diffusion_models" / "sd3.5-medium.safetensors"
    command = [comfy.python, HERE / "room.py", comfy.folder, HERE.parents[1], model]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.pop("again") == {"said": "done", "held": [1, 0]}
    assert outcomes.pop("in vain") == {"held": [0]}, "nothing was left to make room with"
    short = outcomes.pop("short")
    assert len(outcomes) == 4 and all(outcome == {"said": "", "loaded": 1} for outcome in outcomes.values())
    assert short["loaded"] == 0
    assert "11776 MiB are needed for rank 3 on cuda:1 (2048 MiB free)" in short["said"]
