"""Core's nodes that change self-attentions give one latent on a local MODEL and on its parallel twin, at 1 to 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from census import assert_kept
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend

Outcomes = dict[str, dict[str, Any]]


def run(comfy: ComfyInstallation, backend: Backend, files: Path) -> Outcomes:
    found = run_twins(comfy, backend, files, "attention_cases", seconds=400, TWINS_WORLD=str(backend.world_size))
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    return run(comfy, backend2, unets)


def wrong(outcomes: Outcomes) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    assert len(outcomes) > 15 and not wrong(outcomes), wrong(outcomes)


def test_the_page_of_nodes_says_so(outcomes: Outcomes, comfy: ComfyInstallation) -> None:
    assert_kept(outcomes, comfy.folder)


def test_each_changes_the_latent(outcomes: Outcomes) -> None:
    """All but those that are made for a UNet, on another model."""
    still = {name for name, outcome in outcomes.items() if outcome["effect"] < 1e-3}
    assert still == {f"sd3.5-large, {node}, without effect" for node in ("HyperTile", "NAGuidance")}


def test_only_what_needs_it_goes_step_by_step(outcomes: Outcomes) -> None:
    said = {name.removeprefix("sdxl, "): outcome.get("said", "") for name, outcome in outcomes.items()}
    for whole in ("NAGuidance on all", "NAGuidance, odd, on all", "HyperTile on all"):
        assert "the whole loop in the backend" in said[whole]
    assert "'disable_cfg1_optimization'" in said["NAGuidance, cfg 1"]
    assert "rows of both prompts, which are of unlike lengths" in said["NAGuidance, a longer prompt"]
    assert "HyperTile with a swap_size above 2" in said["HyperTile that draws, on all"]
    assert "sampler_post_cfg_function" in said["SelfAttentionGuidance on all"]
