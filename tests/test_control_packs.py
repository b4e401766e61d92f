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
PYTHONPATH = {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PACKS_PYTHONPATH"))))}


@dataclass(frozen=True)
class Pack:
    """`variable` has its folder, if another than the common one; `imports` are packages that ComfyUI itself does without."""

    name: str
    variable: str
    cases: str
    imports: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return Path(os.environ.get(self.variable, f"~/comfy/packs/{self.name}")).expanduser()

    def missing(self, comfy: ComfyInstallation) -> str:
        """Why it can't be tried; empty where it can."""
        if not (self.folder / "__init__.py").is_file():
            return f"no {self.name} at {self.folder}"
        look = f"import importlib.util; print(*[n for n in {self.imports} if importlib.util.find_spec(n) is None])"
        environment = os.environ | PYTHONPATH
        done = subprocess.run([comfy.python, "-c", look], capture_output=True, text=True, check=True, env=environment)
        lacks = done.stdout.strip()
        return f"{comfy.python} lacks {lacks}, which {self.name} imports" if lacks else ""


ADVANCED = Pack("ComfyUI-Advanced-ControlNet", "ADVANCED_CONTROLNET_PATH", "advanced_control_cases")
LAYER_DIFFUSE = Pack("ComfyUI-layerdiffuse", "LAYERDIFFUSE_PATH", "layer_diffuse_cases", ("cv2", "diffusers"))
BRUSHNET = Pack("ComfyUI-BrushNet", "BRUSHNET_PATH", "brushnet_cases", ("accelerate", "diffusers", "torchvision"))
PACKS = (ADVANCED, LAYER_DIFFUSE, BRUSHNET)


def run(comfy: ComfyInstallation, backend: Backend, files: Path, *packs: Pack) -> Outcomes:
    environment = PYTHONPATH | {pack.variable: str(pack.folder) for pack in packs}
    world = str(backend.world_size)
    cases = dict.fromkeys(pack.cases for pack in packs)
    found = run_twins(comfy, backend, files, *cases, seconds=400, TWINS_WORLD=world, **environment)
    return {f"{model}, {case}": outcome for model, of_model in found.items() for case, outcome in of_model.items()}


@pytest.fixture(scope="module")
def missing(comfy: ComfyInstallation) -> dict[Pack, str]:
    return {pack: why for pack in PACKS if (why := pack.missing(comfy))}


@pytest.fixture(scope="module")
def outcomes(
    comfy: ComfyInstallation, control_files: Path, backend2: Backend, missing: dict[Pack, str]
) -> dict[Pack, Outcomes]:
    """Of those that are there, in one process."""
    packs = [pack for pack in PACKS if pack not in missing]
    found = run(comfy, backend2, control_files, *packs) if packs else {}
    theirs = {pack: {name: o for name, o in found.items() if f", {pack.name}: " in name} for pack in packs}
    assert sum(map(len, theirs.values())) == len(found)
    return theirs


def of_pack(pack: Pack, outcomes: dict[Pack, Outcomes], missing: dict[Pack, str]) -> Outcomes:
    """The test is skipped where there is none."""
    if pack in missing:
        pytest.skip(missing[pack])
    return outcomes[pack]


@pytest.fixture
def advanced(outcomes: dict[Pack, Outcomes], missing: dict[Pack, str]) -> Outcomes:
    return of_pack(ADVANCED, outcomes, missing)


def wrong(outcomes: Outcomes) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}


def refused(outcomes: Outcomes) -> set[str]:
    return {name for name, outcome in outcomes.items() if "A parallel MODEL can't honour" in outcome["said"]}


def without_effect(outcomes: Outcomes) -> set[str]:
    return {name for name, outcome in outcomes.items() if outcome["effect"] < 1e-2} - refused(outcomes)


def test_advanced_controlnets_give_one_latent_on_both(advanced: Outcomes) -> None:
    assert len(advanced) > 40 and not wrong(advanced), wrong(advanced)
    assert not without_effect(advanced)


def test_what_comfyui_computes_of_them_is_said(advanced: Outcomes) -> None:
    said = {name: outcome["said"] for name, outcome in advanced.items() if name not in refused(advanced)}
    parts = ("ComfyUI computes", "is no ControlNet that the ranks know", "MiB of residuals an evaluation")
    assert not {name for name, words in said.items() if not all(part in words for part in parts)}
    strength = next(words for name, words in said.items() if name.endswith("strength"))
    # Named by its file, and its class by the pack's folder, not by where this lies.
    assert f"control-one.safetensors: {ADVANCED.folder.name}.adv_control.control.ControlNetAdvanced is no" in strength


def test_those_that_work_inside_the_blocks_are_refused_before_the_first_step(advanced: Outcomes) -> None:
    names = refused(advanced)
    assert len(names) == 6 and all("Reference" in name or "LLLite" in name for name in names), names


def test_advanced_controlnets_on_one_rank(
    comfy: ComfyInstallation, control_files: Path, runtime_folder: Path, missing: dict[Pack, str]
) -> None:
    if ADVANCED in missing:
        pytest.skip(missing[ADVANCED])
    backend = Backend(1, "cpu", "packs1", idle_seconds=300)
    found = run(comfy, backend, control_files, ADVANCED)
    backend.stop()
    assert len(found) >= 8 and not wrong(found) and not without_effect(found), wrong(found)


def test_layer_diffuse(outcomes: dict[Pack, Outcomes], missing: dict[Pack, str]) -> None:
    found = of_pack(LAYER_DIFFUSE, outcomes, missing)
    assert len(found) > 12 and not wrong(found), wrong(found)
    assert len(refused(found)) == 4  # of each mesh the two that widen the first layer
    # ComfyUI no longer knows the form of what the attention's file holds: it leaves that out, with a line in its log.
    assert all("Attention Injection" in name for name in without_effect(found)), without_effect(found)


def test_brushnet_is_refused(outcomes: dict[Pack, Outcomes], missing: dict[Pack, str]) -> None:
    found = of_pack(BRUSHNET, outcomes, missing)
    assert not wrong(found) and len(refused(found)) == len(found) == 2, wrong(found)
