"""The pack ComfyUI-NAG, its own code: a local MODEL and its parallel twin give one latent, or the parallel one refuses by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

NAG = Pack("ComfyUI-NAG", "NAG_PATH", "nag_pack_cases", ("einops",))
REFUSED = {
    "another version": "Normalized attention guidance (ComfyUI-NAG) is of a version that is not known: it computes something else",
    "NAGGuider of another batch": "is for a batch of 2; here are 1 latents",
}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    if missing := NAG.missing(comfy):
        pytest.skip(missing)
    return run(comfy, backend2, unets, NAG)


def case_of(name: str) -> str:
    return name.rpartition(": ")[2]


def test_each_gives_one_latent_on_both_and_changes_it(outcomes: Outcomes) -> None:
    computed = {name: outcome for name, outcome in outcomes.items() if case_of(name) not in REFUSED}
    assert len(computed) >= 18 and not wrong(computed), wrong(computed)
    still = {case_of(name) for name, outcome in computed.items() if outcome["effect"] < 1e-3}
    assert still == {"a scale of 1 after it"}


def test_what_is_not_known_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    refused = {name: o.get("refused") or "" for name, o in outcomes.items() if case_of(name) in REFUSED}
    assert len(refused) == 3 and {name: r for name, r in refused.items() if REFUSED[case_of(name)] not in r} == {}


def test_the_backends_loop_has_all_but_what_differs_by_evaluation(outcomes: Outcomes) -> None:
    steps = {name: o["said"] for name, o in outcomes.items() if "step by step: " in o.get("said", "")}
    assert {case_of(name) for name in steps} == {"step by step", "a longer prompt"}
    longer = {name: words for name, words in steps.items() if case_of(name) == "a longer prompt"}
    # A UNet makes nothing else of a prompt that is repeated.
    assert [name.partition(",")[0] for name in longer] == ["sd3.5-large"]
    assert all("ComfyUI-NAG with prompts of unlike lengths" in words for words in longer.values())
