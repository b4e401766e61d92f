"""Core's token merging: where it merges nothing a parallel MODEL runs as a local one, and elsewhere it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, backend2: Backend, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, tiny = tmp_path_factory.mktemp("merging"), CONFIGS["tiny"]
    fine = replace(tiny, down_depths=((1,), (1,), (1,)), up_depths=((1, 1), (1, 1), (1, 1)))
    for name, config in (("tiny", tiny), ("fine", fine)):
        write_unet(Path(folder) / f"unet-{name}.safetensors", config, "single file")
    return run_twins(comfy, backend2, folder, "merging_cases", seconds=400)


def test_on_sdxl_it_changes_nothing_and_draws_nothing(outcomes: dict[str, Any]) -> None:
    found = outcomes["sdxl"]
    assert len(found) == 5 and all(o.get("far", 1) <= 1e-4 for o in found.values()), found
    assert all("whole loop" in outcome["said"] for outcome in found.values())


def test_where_it_would_merge_it_is_refused_by_name(outcomes: dict[str, Any]) -> None:
    merging, idle = outcomes["sdxl, fine"]["16 x 12"], outcomes["sdxl, fine"]["16 x 12, ratio 0"]
    assert (
        merging["failed"] == "parallel" and "TomePatchModel, which merges the tokens at input 1 0" in merging["refused"]
    )
    assert idle["far"] <= 1e-4, idle
