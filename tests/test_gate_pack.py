"""T-Gate by its pack's own code: a local MODEL and its parallel twin give one latent, or the parallel one refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

TGATE = Pack("ComfyUI_TGate", "TGATE_PATH", "gate_cases")
REFUSED = {
    "TGateApply": "transformer option 'tgate_enable'",
    "other blocks": "comfyui_tgate 0.1.0 with blocks of",
    "two samplers": "would take what an earlier sampling kept, which did not end at timestep 0",
}


def of_case(outcomes: Outcomes) -> dict[str, str]:
    return {name: name.rpartition(": ")[2] for name in outcomes}


def computed(outcomes: Outcomes) -> Outcomes:
    return {name: outcomes[name] for name, case in of_case(outcomes).items() if case not in REFUSED}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    if missing := TGATE.missing(comfy):
        pytest.skip(missing)
    return run(comfy, backend2, unets, TGATE)


def test_each_gives_one_latent_on_both_and_changes_it(outcomes: Outcomes) -> None:
    found = computed(outcomes)
    assert len(found) >= 6 and not wrong(found), wrong(found)
    assert not {name for name, outcome in found.items() if outcome["effect"] < 1e-3}


def test_comfyui_makes_the_steps_and_says_why(outcomes: Outcomes) -> None:
    assert all("model option 'model_function_wrapper'" in outcome["said"] for outcome in computed(outcomes).values())


def test_what_can_not_be_honoured_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    errors = {case: outcomes[name] for name, case in of_case(outcomes).items() if case in REFUSED}
    assert errors.keys() == REFUSED.keys()
    for case, outcome in errors.items():
        assert outcome.get("failed") == "parallel" and REFUSED[case] in (outcome["refused"] or ""), outcome
