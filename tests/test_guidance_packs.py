"""MODEL nodes of the packs ComfyUI-ppm, ComfyUI_experiments and ComfyUI-AutomaticCFG, their own code: a local MODEL and its parallel twin
give one latent, or the parallel one refuses by name. Each pack is left out where it isn't there."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

CASES = "guidance_pack_cases"
PPM = Pack("ComfyUI-ppm", "PPM_PATH", CASES)
EXPERIMENTS = Pack("ComfyUI_experiments", "EXPERIMENTS_PATH", CASES)
AUTOMATIC_CFG = Pack("ComfyUI-AutomaticCFG", "AUTOMATIC_CFG_PATH", "automatic_cfg_cases", ("colorama",))
# Of each pack how many cases there are on a UNet, and on a transformer.
COUNTS = {PPM: (19, 12), EXPERIMENTS: (3, 3)}
OF_EXPERIMENTS = {"RescaleClassifierFreeGuidance", "ModelSamplerTonemapNoiseTest", "TonemapNoiseWithRescaleCFG"}
REFUSED = {"ModelAttentionSelector": "transformer option 'optimized_attention_override'"}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    missing = {pack: why for pack in COUNTS if (why := pack.missing(comfy))}
    if len(missing) == len(COUNTS):
        pytest.skip("; ".join(missing.values()))
    return run(comfy, backend2, unets, *(pack for pack in COUNTS if pack not in missing))


def case_of(name: str) -> str:
    """Without its model and mesh."""
    rest = name.partition(", ")[2]
    return rest.partition(", ")[2] if "=" in rest.partition(", ")[0] else rest


def computed(outcomes: Outcomes) -> Outcomes:
    return {name: outcome for name, outcome in outcomes.items() if case_of(name) not in REFUSED}


@pytest.mark.parametrize("pack", COUNTS, ids=lambda pack: pack.name)
def test_each_gives_one_latent_on_both_and_changes_it(pack: Pack, comfy: ComfyInstallation, outcomes: Outcomes) -> None:
    if missing := pack.missing(comfy):
        pytest.skip(missing)
    theirs = {name: o for name, o in outcomes.items() if (case_of(name) in OF_EXPERIMENTS) == (pack is EXPERIMENTS)}
    counts = tuple(sum(name.startswith(family) for name in theirs) for family in ("sdxl", "sd3.5"))
    assert counts == COUNTS[pack] and not wrong(computed(theirs)), wrong(computed(theirs))
    without = {name for name, outcome in computed(theirs).items() if outcome["effect"] < 1e-3}
    assert without == {name for name in theirs if name.endswith("without effect")}


def test_the_backend_runs_the_loop_with_free_u(outcomes: Outcomes) -> None:
    found = {name: o["said"] for name, o in computed(outcomes).items() if "FreeU" in name}
    assert not {name: said for name, said in found.items() if said.startswith("step by") != ("step by step" in name)}


def test_what_can_not_be_honoured_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    refused = {name: o for name, o in outcomes.items() if case_of(name) in REFUSED}
    assert refused
    for name, outcome in refused.items():
        assert outcome.get("failed") == "parallel" and REFUSED[case_of(name)] in (outcome["refused"] or ""), outcome


def test_automatic_cfg_runs_but_for_experiments_with_other_attentions(
    comfy: ComfyInstallation, unets: Path, backend2: Backend
) -> None:
    """In a process of its own: it puts a function in the place of ComfyUI's own, for all MODELs."""
    if missing := AUTOMATIC_CFG.missing(comfy):
        pytest.skip(missing)
    outcomes = run(comfy, backend2, unets, AUTOMATIC_CFG)
    assert len(outcomes) == 2 * 8 + 3 and not wrong(outcomes), wrong(outcomes)
    assert not {name for name, outcome in outcomes.items() if outcome["effect"] < 1e-3}
    refused = {name for name, outcome in outcomes.items() if "which patches blocks" in outcome["said"]}
    assert refused == {name for name in outcomes if name.endswith("by attentions")}
