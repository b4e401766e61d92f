"""What patches attention and blocks gives one latent on a local MODEL and on its parallel twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from census import assert_kept
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend

Outcomes = dict[str, dict[str, Any]]
MODULES = ("inside_cases", "cache_cases", "block_cases")

# What changes nothing, here as on a local MODEL.
WITHOUT_EFFECT = {"EasyCache on SD3", "shrunk at block 32", "shrunk at no step"}


def run(comfy: ComfyInstallation, backend: Backend, files: Path) -> Outcomes:
    found = run_twins(comfy, backend, files, *MODULES, seconds=400, TWINS_WORLD=str(backend.world_size))
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    return run(comfy, backend2, unets)


def wrong(outcomes: Outcomes) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}


def without_effect(outcomes: Outcomes) -> set[str]:
    return {name.rsplit(", ", 1)[-1] for name, outcome in outcomes.items() if outcome["effect"] < 1e-3}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    assert len(outcomes) > 3 and not wrong(outcomes), wrong(outcomes)


def test_each_changes_the_latent_or_is_known_not_to(outcomes: Outcomes) -> None:
    assert without_effect(outcomes) == WITHOUT_EFFECT


def test_the_kept_table_of_nodes_says_the_same(outcomes: Outcomes, comfy: ComfyInstallation) -> None:
    assert_kept(outcomes, comfy.folder)
