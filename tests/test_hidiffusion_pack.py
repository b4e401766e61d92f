"""The pack comfyui_jankhidiffusion, its own code: a local MODEL and its parallel twin give one latent, or the parallel one refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

HIDIFFUSION = Pack("comfyui_jankhidiffusion", "JANKHIDIFFUSION_PATH", "hidiffusion_pack_cases")
REFUSED = {
    "attention to the prompt": "force_apply_attn2 of MSW-MSA",
    "windows in windows": "two MSW-MSA nodes at one attention",
    "multipliers where skipped": "multipliers of MSW-MSA with scale_mode skip",
}
# As a local MODEL, which has no other way out, in mid-picture.
FAILS_EVERYWHERE = "nothing resizes back"
WITHOUT_EFFECT = {"Simple, low", "MSW-MSA, skipped where odd"}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    if missing := HIDIFFUSION.missing(comfy):
        pytest.skip(missing)
    found = run(comfy, backend2, unets, HIDIFFUSION)
    return {name.rpartition(f"{HIDIFFUSION.name}: ")[2] + name.partition(", ")[0][:0]: o for name, o in found.items()}


def computed(outcomes: Outcomes) -> Outcomes:
    return {name: o for name, o in outcomes.items() if name not in REFUSED and name != FAILS_EVERYWHERE}


def test_each_gives_one_latent_on_both_and_changes_it(outcomes: Outcomes) -> None:
    found = computed(outcomes)
    assert len(found) >= 20 and not wrong(found), wrong(found)
    assert {name for name, outcome in found.items() if outcome["effect"] < 1e-3} == WITHOUT_EFFECT


def test_the_backend_runs_the_loop_but_where_chance_or_the_step_decides(outcomes: Outcomes) -> None:
    by_steps = {name for name, o in computed(outcomes).items() if o["said"].startswith("step by step")}
    assert by_steps == {name for name in computed(outcomes) if "MSW-MSA" in name or "step by step" in name}


def test_what_can_not_be_exact_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    for case, words in REFUSED.items():
        assert outcomes[case]["failed"] == "parallel" and words in (outcomes[case]["refused"] or ""), outcomes[case]
