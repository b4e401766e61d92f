"""Other people's packs of ControlNets and the like, their own code beside this pack's: a local MODEL and its parallel twin give one
latent, or the parallel one refuses by name.

Each is looked for in a folder outside this one, and left out where it isn't there, or ComfyUI's Python lacks what it imports;
PACKS_PYTHONPATH adds to that.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import HERE, ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend

Outcomes = dict[str, dict[str, Any]]
PYTHONPATH = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PACKS_PYTHONPATH"))))


@dataclass(frozen=True)
class Pack:
    """`variable` has its folder, if another than the common one; `needs` are the packages that it imports."""

    name: str
    variable: str
    needs: tuple[str, ...] = ()

    def found(self, comfy: ComfyInstallation) -> dict[str, str]:
        """What its cases read in the environment; the test is skipped where there is no such pack."""
        folder = Path(os.environ.get(self.variable, f"~/comfy/packs/{self.name}")).expanduser()
        if not (folder / "__init__.py").is_file():
            pytest.skip(f"no {self.name} at {folder}")
        look = f"import importlib.util; print(*[n for n in {self.needs} if importlib.util.find_spec(n) is None])"
        environment = {"PYTHONPATH": PYTHONPATH}
        command = [comfy.python, "-c", look]
        lacks = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
        if missing := lacks.stdout.strip():
            pytest.skip(f"{comfy.python} lacks {missing}, which {self.name} imports")
        return environment | {self.variable: str(folder)}


ADVANCED = Pack("ComfyUI-Advanced-ControlNet", "ADVANCED_CONTROLNET_PATH")
LAYER_DIFFUSE = Pack("ComfyUI-layerdiffuse", "LAYERDIFFUSE_PATH", ("cv2", "diffusers"))
BRUSHNET = Pack("ComfyUI-BrushNet", "BRUSHNET_PATH", ("accelerate", "diffusers", "torchvision"))


def run(comfy: ComfyInstallation, backend: Backend, files: Path, pack: Pack, cases: str) -> Outcomes:
    environment = pack.found(comfy) | {"TWINS_WORLD": str(backend.world_size)}
    found = run_twins(comfy, backend, files, cases, seconds=300, **environment)
    return {f"{model}, {case}": outcome for model, of_model in found.items() for case, outcome in of_model.items()}


def wrong(outcomes: Outcomes) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}


@pytest.fixture(scope="module")
def advanced(comfy: ComfyInstallation, control_files: Path, backend2: Backend) -> Outcomes:
    return run(comfy, backend2, control_files, ADVANCED, "advanced_control_cases")


def test_advanced_controlnets_give_one_latent_on_both(advanced: Outcomes) -> None:
    assert len(advanced) > 40 and not wrong(advanced), wrong(advanced)
    assert not {name for name, outcome in advanced.items() if outcome["effect"] < 1e-2}


def test_what_comfyui_computes_of_them_is_said(advanced: Outcomes) -> None:
    computed = {name: o["said"] for name, o in advanced.items() if "can't honour" not in o["said"]}
    reason = "is no ControlNet that the ranks know"
    silent = {name for name, said in computed.items() if "ComfyUI computes" not in said or reason not in said}
    assert not silent and "ControlNet computed in ComfyUI's process" in computed["sdxl, cfg, strength"]
    # Its modules are told by the pack's name, not by where it lies.
    assert "ComfyUI computes control-one.safetensors: " in computed["sdxl, cfg, strength"]
    assert not {name for name, o in advanced.items() if "/" in o["said"].replace("sent a step", "")}


def test_those_that_work_inside_the_blocks_are_refused_before_the_first_step(advanced: Outcomes) -> None:
    refused = {name for name, outcome in advanced.items() if "A parallel MODEL can't honour" in outcome["said"]}
    assert len(refused) == 6 and all("Reference" in name or "LLLite" in name for name in refused), refused


def test_advanced_controlnets_on_one_rank(comfy: ComfyInstallation, control_files: Path, runtime_folder: Path) -> None:
    ADVANCED.found(comfy)
    backend = Backend.attach_or_start(1, "cpu", "packs1", idle_seconds=300)
    found = run(comfy, backend, control_files, ADVANCED, "advanced_control_cases")
    backend.stop()
    assert len(found) > 8 and not wrong(found), wrong(found)


def test_layer_diffuse(comfy: ComfyInstallation, control_files: Path, backend2: Backend) -> None:
    found = run(comfy, backend2, control_files, LAYER_DIFFUSE, "layer_diffuse_cases")
    assert len(found) > 20 and not wrong(found), wrong(found)
    # ComfyUI has dropped the form of what the attention's file holds: it leaves that out, with a line in its log.
    still = {name for name, o in found.items() if o["effect"] < 1e-2 and "can't honour" not in o["said"]}
    assert all("Attention Injection" in name for name in still), still


def test_brushnet_is_refused(comfy: ComfyInstallation, control_files: Path, backend2: Backend) -> None:
    found = run(comfy, backend2, control_files, BRUSHNET, "brushnet_cases")
    assert len(found) == 2 and not wrong(found), wrong(found)
    assert all("'brush_model_patch'" in outcome["said"] for outcome in found.values())
