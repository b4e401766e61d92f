"""The pack sd-perturbed-attention, its own code: a local MODEL and its parallel twin give one latent, or the parallel one refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

PERTURBED = Pack("sd-perturbed-attention", "PERTURBED_ATTENTION_PATH", "perturbed_pack_cases")
# Of it only a patch that PLADIS is refused beside, where it is there.
NEGPIP = Pack("ComfyUI-ppm", "PPM_PATH", PERTURBED.cases)


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    if missing := PERTURBED.missing(comfy):
        pytest.skip(missing)
    return run(comfy, backend2, unets, PERTURBED, *([] if NEGPIP.missing(comfy) else [NEGPIP]))


def refused(outcomes: Outcomes) -> dict[str, str]:
    return {name: o["error"] for name, o in outcomes.items() if "UnsupportedError" in o.get("error", "")}


def test_each_gives_one_latent_on_both_and_changes_it(outcomes: Outcomes) -> None:
    computed = {name: outcome for name, outcome in outcomes.items() if name not in refused(outcomes)}
    assert len(computed) >= 10 and not wrong(computed), wrong(computed)
    without = {name for name, outcome in computed.items() if outcome["effect"] < 1e-3}
    assert without == {name for name in computed if name.endswith("without effect")}


def test_the_backend_runs_the_loop_where_nothing_acts_between_evaluations(outcomes: Outcomes) -> None:
    said = {name.rpartition(": ")[2]: outcome.get("said", "") for name, outcome in outcomes.items()}
    whole = {name for name, words in said.items() if "the whole loop in the backend" in words}
    assert {"NAG", "NAG of a list, at some sigmas", "NAG, cfg 1", "NAG twice", "PLADIS", "PLADIS of a list"} <= whole
    assert "PLADIS, prompts of two lengths, cfg 1" in whole
    by_steps = [said[name] for name in ("NAG beside PAG", "PLADIS and PAG", "PLADIS, prompts of two lengths")]
    assert (
        all("step by step: " in words for words in by_steps) and "PLADIS with prompts of unlike lengths" in by_steps[2]
    )


def test_what_its_nodes_can_not_mean_is_named_before_the_first_step(
    outcomes: Outcomes, comfy: ComfyInstallation
) -> None:
    errors = {name.rpartition(": ")[2]: error for name, error in refused(outcomes).items()}
    if not NEGPIP.missing(comfy):
        assert "PLADIS beside the attn2_patch by sdxl_attn2_negpip" in errors.pop("PLADIS beside NegPiP")
    others = {name: errors.pop(name) for name in ("PLADIS of another version", "SEG of another version")}
    assert all("is of a version that is not known: it computes something else" in error for error in others.values())
    assert errors.keys() == {"a block outside", "a blur of 0", "NAG of two prompts"}
    assert "a negative prompt of 2 rows" in errors["NAG of two prompts"]
    assert "the block output 50 of Perturbed-Attention Guidance" in errors["a block outside"]
    assert "a blur_sigma of 0" in errors["a blur of 0"]
