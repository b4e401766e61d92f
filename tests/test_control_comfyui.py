"""ControlNets, T2I-Adapters and Control-LoRAs give one latent on a local MODEL and on its parallel twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend

Outcomes = dict[str, dict[str, Any]]


def run(comfy: ComfyInstallation, backend: Backend, files: Path) -> Outcomes:
    world = str(backend.world_size)
    found = run_twins(comfy, backend, files, "control_cases", seconds=800, TWINS_WORLD=world)
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, control_files: Path, backend2: Backend) -> Outcomes:
    return run(comfy, backend2, control_files)


def wrong(outcomes: Outcomes) -> dict[str, Any]:
    return {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}


def without_effect(outcomes: Outcomes) -> set[str]:
    return {name for name, outcome in outcomes.items() if outcome["effect"] < 1e-2}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    assert len(outcomes) > 80 and not wrong(outcomes), wrong(outcomes)


def test_each_changes_the_latent(outcomes: Outcomes) -> None:
    assert not without_effect(outcomes)


def test_the_whole_loop_stays_in_the_backend_where_the_ranks_compute_all(outcomes: Outcomes) -> None:
    files = {
        name: o["said"] for name, o in outcomes.items() if ", file" in name or "union" in name or "two files" in name
    }
    others = ("step by step", "then a", "in an area", "on a MODEL with a LoRA", "by Parallel Sampler")
    alone = {name: said for name, said in files.items() if not any(words in name for words in others)}
    stepping = {name: said for name, said in alone.items() if "the whole loop in the backend" not in said}
    assert len(alone) > 25 and not stepping, stepping


def test_what_comfyui_computes_is_said_with_its_price(outcomes: Outcomes) -> None:
    patched = outcomes["sdxl, patch, file of a Control-LoRA on a MODEL with a LoRA"]["said"]
    assert (
        "ComfyUI computes control-lora.safetensors: it is made of the MODEL's weights, on which patches lie" in patched
    )
    said = outcomes["sdxl, patch, T2I-Adapter"]["said"]
    assert "ComfyUI computes" in said and "T2IAdapter is no ControlNet that the ranks know" in said, said
    assert "MiB of residuals an evaluation go to the ranks" in said


@pytest.mark.parametrize("world", [1, 3, 4])
def test_other_numbers_of_ranks_give_the_same(
    world: int, comfy: ComfyInstallation, control_files: Path, runtime_folder: Path, request: pytest.FixtureRequest
) -> None:
    if world == 4:
        found = run(comfy, request.getfixturevalue("backend4"), control_files)
    else:
        backend = Backend(world, "cpu", f"control{world}", idle_seconds=300)
        found = run(comfy, backend, control_files)
        backend.stop()
    assert len(found) > 10 and not wrong(found) and not without_effect(found), wrong(found)
