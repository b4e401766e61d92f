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
    "multipliers where skipped": "multipliers of MSW-MSA beside scale_mode skip",
    "PAG at a window": "MSW-MSA beside the attn1 patch at middle 0 by PerturbedAttentionGuidance",
    "HyperTile and windows": "MSW-MSA beside the attn1_patch by HyperTile",
    "nothing resizes back": "At output block 3 a picture of 3 x 2 values (height x width) meets one of 6 x 4",
    "all of it smaller": "At the end a picture of",
    "a method that isn't there": "no method 'lanczos' of resizing",
    "no number": "pre_upscale_multiplier is 'two'",
    "another version of RAUNet": "comfyui_jankhidiffusion 0.8.5 hangs another RAUNet than the known one",
    "another version of MSW-MSA": "comfyui_jankhidiffusion 0.8.5 hangs another MSW-MSA attention than the known one",
    "RAUNet with ComfyUI-bleh": "RAUNet resizes by hidiffusion_pack_cases:sized",
    "MSW-MSA with ComfyUI-bleh": "MSW-MSA attention resizes by hidiffusion_pack_cases:sized",
}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, control_files: Path, backend2: Backend) -> Outcomes:
    assert unets == control_files  # which have files in one folder
    if missing := HIDIFFUSION.missing(comfy):
        pytest.skip(missing)
    return run(comfy, backend2, unets, HIDIFFUSION)


def case_of(name: str) -> str:
    return name.rpartition(f"{HIDIFFUSION.name}: ")[2]


def computed(outcomes: Outcomes) -> Outcomes:
    return {name: outcome for name, outcome in outcomes.items() if case_of(name) not in REFUSED}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    """Which of them change a picture, the cases themselves look at."""
    found = computed(outcomes)
    assert len(found) >= 25 and not wrong(found), wrong(found)


def test_the_backend_runs_the_loop_but_where_chance_or_the_step_decides(outcomes: Outcomes) -> None:
    by_steps = {case_of(name) for name, o in computed(outcomes).items() if o["said"].startswith("step by step")}
    of_steps = {case_of(name) for name in computed(outcomes) if "MSW-MSA" in name or "step by step" in name}
    assert by_steps == {*of_steps, "both Simple, ultra"}


def test_what_can_not_be_exact_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    refused = {case_of(name): outcome for name, outcome in outcomes.items() if case_of(name) in REFUSED}
    assert refused.keys() == REFUSED.keys()
    for case, outcome in refused.items():
        assert outcome.get("failed") == "parallel" and REFUSED[case] in (outcome["refused"] or ""), outcome
