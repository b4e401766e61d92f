"""The pack sd-perturbed-attention, its own code: a local MODEL and its parallel twin give one latent, or the parallel one refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

PERTURBED = Pack("sd-perturbed-attention", "PERTURBED_ATTENTION_PATH", "perturbed_pack_cases")


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    if missing := PERTURBED.missing(comfy):
        pytest.skip(missing)
    return run(comfy, backend2, unets, PERTURBED)


def refused(outcomes: Outcomes) -> dict[str, str]:
    return {name: o["error"] for name, o in outcomes.items() if "UnsupportedError" in o.get("error", "")}


def test_each_gives_one_latent_on_both_and_changes_it(outcomes: Outcomes) -> None:
    computed = {name: outcome for name, outcome in outcomes.items() if name not in refused(outcomes)}
    assert len(computed) >= 10 and not wrong(computed), wrong(computed)
    assert not {name for name, outcome in computed.items() if outcome["effect"] < 1e-3}


def test_normalized_guidance_is_in_the_backends_loop(outcomes: Outcomes) -> None:
    said = {name.rpartition(": ")[2]: outcome.get("said", "") for name, outcome in outcomes.items()}
    whole = {name for name, words in said.items() if "the whole loop in the backend" in words}
    assert {"NAG", "NAG of a list, at some sigmas", "NAG, cfg 1", "NAG twice"} <= whole
    assert "step by step: " in said["NAG beside PAG"]


def test_what_its_nodes_can_not_mean_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    errors = {name.rpartition(": ")[2]: error for name, error in refused(outcomes).items()}
    assert errors.keys() == {"a block outside", "a blur of 0", "NAG of two prompts", "PLADIS", "TPG"}
    assert "a negative prompt of 2 rows" in errors["NAG of two prompts"]
    assert "pladis_utils" in errors["PLADIS"]
    assert "transformer_blocks.0.forward" in errors["TPG"]
    assert "the block output 50 of Perturbed-Attention Guidance" in errors["a block outside"]
    assert "a blur_sigma of 0" in errors["a blur of 0"]
