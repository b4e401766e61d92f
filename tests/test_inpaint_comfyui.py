"""UNets with more input channels than a latent has, and EDM's, in a real ComfyUI: a local MODEL and its parallel twin draw one latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import Outcomes, run_twins

from parallel_backend import Backend
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

CHANNELS = torch.linspace(-1, 1, 4)
COSXL = {"edm_vpred.sigma_max": torch.tensor(90.0), "edm_vpred.sigma_min": torch.tensor(0.004)}
FILES = {
    "cosxl": ("tiny", COSXL),
    "cosxl-edit": ("editing", COSXL),
    "playground": ("tiny", {"edm_mean": CHANNELS, "edm_std": 2 + CHANNELS}),
}
# These models know of no picture in a prompt.
HEEDLESS = {"plain", "sd3"}
# What only ComfyUI's own loop can do; all else is one request.
STEP_BY_STEP = {"step by step", "two prompts", "DualCFGGuider", "euler_cfg_pp"}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    for name, (config, marks) in FILES.items():
        write_unet(unets / f"unet-{name}.safetensors", CONFIGS[config], "single file", extra=marks)
    for name in ("inpainting", "editing"):
        write_unet(unets / "renamed" / f"unet-{name}.safetensors", CONFIGS[name])
    return run_twins(comfy, backend2, unets, "inpaint_cases", seconds=300)


def named(outcomes: Outcomes) -> dict[tuple[str, str], dict[str, Any]]:
    return {(model, case): outcome for model, cases in outcomes.items() for case, outcome in cases.items()}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    wrong = {name: o.get("error", o.get("far")) for name, o in named(outcomes).items() if not o.get("far", 1) <= 1e-4}
    assert len(named(outcomes)) > 70 and not wrong, wrong


def test_each_changes_the_latent_of_a_model_that_knows_of_pictures(outcomes: Outcomes) -> None:
    still = {case for (model, case), o in named(outcomes).items() if model not in HEEDLESS and o["effect"] < 1e-3}
    assert still == {"no picture"}


def test_the_backend_runs_the_loop_of_all_that_it_knows(outcomes: Outcomes) -> None:
    said = {case: outcome["said"] for (_, case), outcome in named(outcomes).items() if outcome["said"]}
    assert {case for case, words in said.items() if words.startswith("step by step: ")} >= STEP_BY_STEP
    others = {case: words for case, words in said.items() if case not in STEP_BY_STEP and "c_concat" not in case}
    assert all("the whole loop in the backend" in words for words in others.values()), others
