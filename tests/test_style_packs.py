"""Attention and norms shared by the rows of a batch, by the packs' own code: a local MODEL and its parallel twin give one latent, or the
parallel one refuses. Each pack is left out where it isn't there."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui.installation import ComfyInstallation
from test_control_packs import Outcomes, Pack, run, wrong

from parallel_backend import Backend

ALIGNED = Pack("style_aligned_comfy", "STYLE_ALIGNED_PATH", "style_cases")
REFERENCE = Pack("ComfyUI_experiments", "EXPERIMENTS_PATH", "style_cases")
PACKS = (ALIGNED, REFERENCE)
BY_STEPS = {"BatchAlign, by steps", "ReferenceSampler", "ReferenceOnlySimple, by steps"}
REFUSED = {
    "BatchAlign, odd rows": "shared attention (style_aligned_comfy 1.0.0) of 1 rows: its own code fails",
    "BatchAlign and HyperTile": "(style_aligned_comfy 1.0.0) beside another patch of self-attentions",
    "norms, odd rows": "shared norms (style_aligned_comfy 1.0.0) of 1 rows",
    "ReferenceOnlySimple, another batch": "shared attention (ComfyUI_experiments) of 3 rows: its own code fails",
}


def case_of(name: str) -> str:
    """Without the MODEL's name, which ends in "aligned"."""
    return name.partition("aligned, ")[2]


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    missing = {pack: why for pack in PACKS if (why := pack.missing(comfy))}
    if len(missing) == len(PACKS):
        pytest.skip("; ".join(missing.values()))
    return run(comfy, backend2, unets, *[pack for pack in PACKS if pack not in missing])


def computed(outcomes: Outcomes) -> Outcomes:
    return {name: outcome for name, outcome in outcomes.items() if case_of(name) not in REFUSED}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    found = computed(outcomes)
    assert len(found) >= 3 and not wrong(found), wrong(found)


def test_the_backend_runs_the_loop_but_for_those_of_which_comfyui_makes_the_steps(outcomes: Outcomes) -> None:
    by_steps = {case_of(name) for name, o in computed(outcomes).items() if o["said"].startswith("step by step")}
    assert by_steps == BY_STEPS & {case_of(name) for name in outcomes}


def test_what_can_not_be_honoured_is_named_before_the_first_step(outcomes: Outcomes) -> None:
    errors = {case: outcome for name, outcome in outcomes.items() if (case := case_of(name)) in REFUSED}
    assert errors
    for case, outcome in errors.items():
        assert outcome.get("failed") == "parallel" and REFUSED[case] in (outcome["refused"] or ""), outcome
