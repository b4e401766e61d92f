"""Guidance nodes of ComfyUI's that the backend's loop has give one latent on a local MODEL and on its parallel twin, at 1 to 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend

Outcomes = dict[str, dict[str, Any]]


def run(comfy: ComfyInstallation, backend: Backend, files: Path) -> Outcomes:
    found = run_twins(comfy, backend, files, "guidance_cases", seconds=400, TWINS_WORLD=str(backend.world_size))
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    return run(comfy, backend2, unets)


def wrong(outcomes: Outcomes) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}


def not_as_named(outcomes: Outcomes) -> dict[str, str]:
    """What ran step by step where the backend's loop was to run it, or the other way round."""
    return {
        name: o["said"] for name, o in outcomes.items() if ("step by step: " in name) != ("step by step: " in o["said"])
    }


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    assert len(outcomes) > 10 and not wrong(outcomes), wrong(outcomes)


def test_the_backend_runs_the_loop_of_those_that_it_has(outcomes: Outcomes) -> None:
    assert not not_as_named(outcomes), not_as_named(outcomes)
