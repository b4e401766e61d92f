"""What people hang on a MODEL and on CONDITIONING gives one latent on a local MODEL and on its parallel twin: the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from census import assert_kept
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import Outcomes, run_twins

from parallel_backend import Backend

# What changes nothing, here as on a local MODEL.
WITHOUT_EFFECT = {
    *("strength 0", "no key fits", "denoise 0", "ReferenceLatent", "DifferentialDiffusion"),
    *("ModelSamplingDiscrete eps", "ModelSamplingDiscrete lcm"),  # its sigmas, at these steps
    "a pack's patcher, patched",
}
# What only ComfyUI's own loop can do; all else is one request.
STEP_BY_STEP = {
    *("Mahiro", "FreSca", "CFGZeroStar", "CFGNorm", "TCFG", "RenormCFG", "TemporalScoreRescaling"),
    *(
        "LatentApplyOperationCFG",
        "ContextWindowsManual",
    ),
    *(
        "ConditioningSetArea",
        "ConditioningSetMask",
        "an area of 32 pixels",
        "ConditioningCombine",
        "ConditioningSetTimestepRange",
        "the official SD3 negative",
    ),
    *("sampler dpmpp_2m_sde_gpu", "sampler euler_cfg_pp", "SamplerEulerAncestral, eta 0.5"),
    "FlipSigmas",
    *("a pack's sampling_function", "a pack's sample_euler", "a pack's sampler around core's"),
    "a pack's partial of core's sampler",
    *("a pack's default_noise_sampler", "a pack's apply_model"),
    *("a pack's object patch extra_conds", "a pack's object patch process_latent_out"),
    *("a pack's partial", "a pack's object", "a pack's closure"),
    *("hook on one prompt", "hook with keyframes", "hook of a model", "LoRA and hook"),
}
# Cases of cores that are older than the newest.
OLDER = {"RescaleCFG of older cores"}


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> Outcomes:
    modules = ("patch_cases", "node_cases", "size_cases")
    return run_twins(comfy, backend2, unets, *modules, seconds=500)


def named(outcomes: Outcomes) -> dict[str, dict[str, Any]]:
    return {f"{model}, {case}": outcome for model, cases in outcomes.items() for case, outcome in cases.items()}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    wrong = {name: o.get("error", o.get("far")) for name, o in named(outcomes).items() if not o.get("far", 1) <= 1e-4}
    assert len(named(outcomes)) > 100 and not wrong, wrong


def test_each_changes_the_latent_or_is_known_not_to(outcomes: Outcomes) -> None:
    still = {name.split(", ", 1)[1] for name, o in named(outcomes).items() if o["effect"] < 1e-3}
    assert still <= WITHOUT_EFFECT, still


def test_the_backend_runs_the_loop_of_all_that_it_knows(outcomes: Outcomes) -> None:
    said = {name.split(", ", 1)[1] for name, o in named(outcomes).items() if o["said"].startswith("step by step: ")}
    whole = {
        name.split(", ", 1)[1] for name, o in named(outcomes).items() if "the whole loop in the backend" in o["said"]
    }
    assert said - OLDER == STEP_BY_STEP and len(whole) > 30 and not said & whole


def test_what_only_comfyuis_loop_can_do_is_told_by_its_node(outcomes: Outcomes) -> None:
    of_sdxl = outcomes["sdxl"]
    for case, node in (("Mahiro", "Mahiro of nodes_mahiro"), ("a pack's object", "WeakerGuidance of node_cases")):
        said = of_sdxl[case]["said"].splitlines()[0]
        assert said == f"step by step: model option 'sampler_post_cfg_function' by {node}"


def test_patches_on_a_patcher_that_a_pack_has_made_are_refused_before_the_first_step(outcomes: Outcomes) -> None:
    said = {name: o["said"] for name, o in named(outcomes).items() if name.endswith("a pack's patcher, patched")}
    words = "A parallel MODEL can't honour patches of weights on a MODEL that a pack has made of this one."
    assert len(said) == 2 and all(text.startswith(words) for text in said.values()), said


def test_the_kept_table_of_nodes_says_the_same(outcomes: Outcomes, comfy: ComfyInstallation) -> None:
    assert_kept(named(outcomes), comfy.folder)
