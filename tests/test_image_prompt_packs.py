"""Image prompts by other people's packs, their own code beside this pack's: a local MODEL and its parallel twin give one latent.

Each pack is looked for in a folder outside this one, and left out where it isn't there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins
from test_control_packs import Pack
from test_perturbed_pack import PERTURBED
from test_region_packs import CGEM156, PPM, PROMPT_CONTROL

from parallel_backend import Backend

Outcomes = dict[str, dict[str, Any]]
CASES, WITH_REGIONS = "image_prompt_cases", "region_picture_cases"
# By the variable that has its folder, if another than the common one.
PACKS = {
    "IPADAPTER_PLUS": Pack("ComfyUI_IPAdapter_plus", "IPADAPTER_PLUS", CASES, ("torchvision", "einops")),
    "INSTANTID": Pack("ComfyUI_InstantID", "INSTANTID", CASES, ("torchvision",)),
    "PULID": Pack("PuLID_ComfyUI", "PULID", CASES, ("torchvision",)),
    "FACESWAP": Pack("comfyui-instantId-faceswap", "FACESWAP", CASES, ("torchvision",)),
}


REGIONAL = (CGEM156, PPM, PROMPT_CONTROL)


@pytest.fixture(scope="module")
def missing(comfy: ComfyInstallation) -> dict[str, str]:
    return {name: why for name, pack in PACKS.items() if (why := pack.missing(comfy))}


def run(comfy: ComfyInstallation, backend: Backend, files: Path, missing: dict[str, str]) -> Outcomes:
    folders = {name: str(pack.folder) for name, pack in PACKS.items() if name not in missing}
    if not PERTURBED.missing(comfy):  # whose guidance goes around image prompts
        folders[PERTURBED.variable] = str(PERTURBED.folder)
    if not folders.keys() & PACKS.keys():
        pytest.skip("; ".join(missing.values()))
    folders |= {pack.variable: str(pack.folder) for pack in REGIONAL if not pack.missing(comfy)}
    cases = (CASES, WITH_REGIONS)
    found = run_twins(comfy, backend, files, *cases, seconds=500, TWINS_WORLD=str(backend.world_size), **folders)
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, control_files: Path, backend2: Backend, missing: dict[str, str]) -> Outcomes:
    return run(comfy, backend2, control_files, missing)


def wrong(outcomes: Outcomes, most: float = 1e-4) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= most}


def of_pack(pack: str, outcomes: Outcomes, missing: dict[str, str]) -> Outcomes:
    """The test is skipped where there is none."""
    if pack in missing:
        pytest.skip(missing[pack])
    return {name: outcome for name, outcome in outcomes.items() if f", {pack}: " in name}


@pytest.mark.parametrize(("pack", "least"), [("IPADAPTER_PLUS", 35), ("INSTANTID", 3), ("PULID", 7)])
def test_each_gives_one_latent_on_both(pack: str, least: int, outcomes: Outcomes, missing: dict[str, str]) -> None:
    found = of_pack(pack, outcomes, missing)
    assert len(found) >= least and not wrong(found), wrong(found)
    without_effect = {name for name, o in found.items() if o["effect"] < 1e-2} - {
        name for name in found if "of SD1.5" in name or "displaced" in name
    }
    assert not without_effect


def test_the_loop_stays_in_the_backend(outcomes: Outcomes, missing: dict[str, str]) -> None:
    found = of_pack("IPADAPTER_PLUS", outcomes, missing)
    by_steps = {name for name, outcome in found.items() if outcome["said"].startswith("step by step")}
    assert all("step by step" in name or "an area" in name for name in by_steps) and len(by_steps) >= 3, by_steps
    told = [outcome["said"] for name, outcome in found.items() if "unknown" not in name and "SD1.5" not in name]
    # As much with two prompts of some steps as with one at every step: an evaluation sends nothing again.
    assert all(re.search(r"inside the model: 0\.[0-4] MiB, sent once", words) for words in told), told
    assert sum("the whole loop in the backend" in outcome["said"] for outcome in found.values()) > 25


def test_in_halves(outcomes: Outcomes, missing: dict[str, str]) -> None:
    found = of_pack("FACESWAP", outcomes, missing)
    assert len(found) >= 3 and not wrong(found, 1e-2), wrong(found, 1e-2)
    assert all(outcome["effect"] > 0.1 for outcome in found.values())


def test_beside_regional_prompts(comfy: ComfyInstallation, outcomes: Outcomes, missing: dict[str, str]) -> None:
    """What the packs give each of a row's prompts, on both routes."""
    lacking = [why for pack in REGIONAL if (why := pack.missing(comfy))]
    lacking += [why for name, why in missing.items() if name != "FACESWAP"]
    if lacking:
        pytest.skip("; ".join(lacking))
    found = {name: o for name, o in outcomes.items() if ", REGIONS: " in name}
    assert len(found) >= 9 and not wrong(found), wrong(found)
    refused = {name for name in found if "two prompts for one latent" in name}
    assert len(refused) == 1
    assert all(o["effect"] > 1e-2 for name, o in found.items() if name not in refused)
    by_steps = {name for name, o in found.items() if o["said"].startswith("step by step")}
    assert by_steps == {name for name in found if "step by step" in name or "prompt-control" in name}


@pytest.mark.parametrize("world", [1, 3, 4])
def test_other_numbers_of_ranks_give_the_same(
    world: int,
    comfy: ComfyInstallation,
    control_files: Path,
    missing: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    if world == 4:
        found = run(comfy, request.getfixturevalue("backend4"), control_files, missing)
    else:
        backend = Backend(world, "cpu", f"pictures{world}", idle_seconds=300)
        found = run(comfy, backend, control_files, missing)
        backend.stop()
    assert len(found) >= 3 and not wrong(found), wrong(found)
