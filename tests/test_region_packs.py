"""Regional prompts and NegPiP by their packs' own code: a local MODEL and its parallel twin give one latent, or the parallel one
refuses by name. Each pack is left out where it isn't there."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins
from test_control_packs import PYTHONPATH, Outcomes, Pack, wrong

from parallel_backend import Backend

CASES = "region_cases"
CGEM156 = Pack("cgem156-ComfyUI", "CGEM156_PATH", CASES)
PPM = Pack("ComfyUI-ppm", "PPM_PATH", CASES)
PROMPT_CONTROL = Pack("comfyui-prompt-control", "PROMPT_CONTROL_PATH", CASES)
# By pack: the cases that give one latent, and those that are refused.
COMPUTED = {
    CGEM156: {"AttentionCouple of cgem156"},
    PPM: {"AttentionCouplePPM", "CLIPNegPip", "CLIPNegPip and AttentionCouplePPM"},
    PROMPT_CONTROL: {"prompt-control's masks"},
}
REFUSED = {
    "the other way round": "Known are one of regional prompts, and NegPiP before it",
    "two AttentionCouplePPM": "Known are one of regional prompts",
}


def present(comfy: ComfyInstallation) -> list[Pack]:
    """Skips where none is there."""
    missing = {pack: why for pack in COMPUTED if (why := pack.missing(comfy))}
    if len(missing) == len(COMPUTED):
        pytest.skip("; ".join(missing.values()))
    return [pack for pack in COMPUTED if pack not in missing]


def run_packs(comfy: ComfyInstallation, backend: Backend, files: Path, packs: list[Pack]) -> Outcomes:
    """One module of cases, which tries what is there."""
    folders = PYTHONPATH | {pack.variable: str(pack.folder) for pack in packs}
    found = run_twins(comfy, backend, files, CASES, seconds=400, TWINS_WORLD=str(backend.world_size), **folders)
    return {f"{model}, {case}": outcome for model, of_model in found.items() for case, outcome in of_model.items()}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    return run_packs(comfy, backend2, unets, present(comfy))


def computed(outcomes: Outcomes) -> Outcomes:
    return {name: outcome for name, outcome in outcomes.items() if name.rpartition(", ")[2] not in REFUSED}


@pytest.mark.parametrize("pack", COMPUTED, ids=lambda pack: pack.name)
def test_each_gives_one_latent_on_both(pack: Pack, comfy: ComfyInstallation, outcomes: Outcomes) -> None:
    if missing := pack.missing(comfy):
        pytest.skip(missing)
    theirs = {name: o for name, o in outcomes.items() if name.rpartition(", ")[2] in COMPUTED[pack]}
    assert {name.rpartition(", ")[2] for name in theirs} == COMPUTED[pack] and not wrong(theirs), wrong(theirs)


def test_the_backend_runs_the_loop_of_those_on_the_model(outcomes: Outcomes) -> None:
    by_steps = {name.rpartition(", ")[2] for name, o in computed(outcomes).items() if o["said"].startswith("step by")}
    assert by_steps <= {"prompt-control's masks"}


def test_what_can_not_be_honoured_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    refused = {name.rpartition(", ")[2]: o for name, o in outcomes.items() if name.rpartition(", ")[2] in REFUSED}
    assert refused
    for case, outcome in refused.items():
        assert outcome.get("failed") == "parallel" and REFUSED[case] in (outcome["refused"] or ""), outcome
