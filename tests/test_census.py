"""The table of ComfyUI's own nodes in docs/core-nodes.md: what it says of nodes that no other test tries, and how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from census import KEPT, REASONS, Row, assert_kept, kept_verdicts, not_kept, page, rows_of, verdict_of
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins

from parallel_backend import Backend

RUNS = {"far": 1e-6, "effect": 0.3, "said": "2 steps, 0.1 s a step, the whole loop in the backend"}
BY_STEPS = RUNS | {"said": "step by step: model option 'x'"}
REFUSED = {
    "error": "UnsupportedError: ...",
    "failed": "parallel",
    "refused": "A parallel MODEL can't honour a; b (c:d).",
}
NODES = {"TorchCompileModel", "FreeU_V2", "Epsilon Scaling"}


def test_nodes_that_no_other_module_tries(comfy: ComfyInstallation, unets: Path, backend2: Backend) -> None:
    found = run_twins(comfy, backend2, unets, "census_cases", seconds=400)
    named = {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}
    assert len(named) > 40
    assert_kept(named, comfy.folder)


def test_each_that_is_refused_has_a_reason_and_no_other_has() -> None:
    kept = kept_verdicts(KEPT.read_text())
    refused = {node for (node, _), told in kept.items() if any(part.startswith("refused") for part in told)}
    assert refused == set(REASONS)


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (RUNS, "whole loop"),
        (BY_STEPS, "step by step"),
        (RUNS | {"far": 2e-4}, "another latent"),
        (RUNS | {"effect": 1e-6}, "no effect (as in ComfyUI)"),
        (REFUSED, "refused: a; b"),
        ({"error": "KeyError: 'x'", "failed": "local", "refused": None}, "fails in ComfyUI itself: KeyError"),
        (
            {"error": "KeyError: 'x'", "failed": "parallel", "refused": None},
            "fails in the parallel MODEL alone: KeyError",
        ),
    ],
)
def test_what_an_outcome_comes_to(outcome: dict[str, Any], verdict: str) -> None:
    assert verdict_of(outcome) == verdict


def test_rows_are_by_the_node_that_a_case_is_named_after() -> None:
    named = {"sdxl, FreeU_V2, strong": RUNS, "sd3.5-large, tp=2, Epsilon Scaling": BY_STEPS, "sdxl, denoise 0": RUNS}
    rows = rows_of(named, NODES)
    assert {node: row.verdicts for node, row in rows.items()} == {
        "FreeU_V2": {"SDXL": ["whole loop"]},
        "Epsilon Scaling": {"SD3.5": ["step by step"]},
    }


def test_what_parallel_sampler_does_otherwise_is_said() -> None:
    row = Row()
    row.add("SDXL", RUNS | {"by_node": RUNS})
    row.add("SD3.5", RUNS | {"by_node": REFUSED})
    assert row.verdicts == {"SDXL": ["whole loop"], "SD3.5": ["whole loop", "by ParallelSampler refused: a; b"]}


def test_a_page_says_what_it_was_made_of_and_nothing_else() -> None:
    rows = rows_of({"sdxl, TorchCompileModel": REFUSED, "sd3.5-large, TorchCompileModel": RUNS}, NODES)
    text = page(rows, "1.2.3")
    assert "Of ComfyUI 1.2.3:" in text and REASONS["TorchCompileModel"] in text
    assert not not_kept(rows, text)
    others = rows_of({"sdxl, TorchCompileModel": BY_STEPS, "sd3.5-large, Epsilon Scaling": RUNS}, NODES)
    assert not_kept(others, text) == ["TorchCompileModel on SDXL: step by step", "Epsilon Scaling on SD3.5: whole loop"]
