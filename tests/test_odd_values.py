"""NaN, infinity, odd sizes and short memory: what a real ComfyUI draws, with what the node says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui.core_run import run_script
from comfyui.installation import HERE, ComfyInstallation

from parallel_backend import Backend

# By model, backend and case.
Outcomes = dict[str, dict[str, dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def backend1(runtime_folder: Path) -> Iterator[Backend]:
    backend = Backend(1, "cpu", "test1")
    yield backend
    backend.stop()


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, unets: Path, backend1: Backend, backend2: Backend) -> Outcomes:
    arguments = (HERE.parents[1], unets.parent, backend1.spec.name, backend2.spec.name)
    return json.loads(run_script(comfy, "odd_values.py", *arguments, seconds=300).splitlines()[-1])


def each(outcomes: Outcomes) -> Iterator[tuple[str, dict[str, Any]]]:
    for model, worlds in outcomes.items():
        for world, cases in worlds.items():
            yield from ((f"{model}, {world}: {case}", outcome) for case, outcome in cases.items())


def test_each_gives_what_comfyui_gives(outcomes: Outcomes) -> None:
    """NaN and infinity at the same places, equal values elsewhere."""
    assert len(list(each(outcomes))) > 40
    assert not [name for name, outcome in each(outcomes) if not outcome["alike"]]
    both = {name for name, outcome in each(outcomes) if 0 < outcome["odd"] < outcome["all"]}
    assert {name.partition(",")[0] for name in both} == set(outcomes), "values are compared too"


def test_the_node_says_what_came_in_and_at_which_step_it_began(outcomes: Outcomes) -> None:
    for world in outcomes["vae"]:
        said = {case: outcome["said"][-1] for case, outcome in outcomes["sd3.5-medium.safetensors"][world].items()}
        begun = {
            case: text for case, text in said.items() if "NaN or infinity" in text and " from step 1 of 2 on" in text
        }
        assert begun.keys() == said.keys()
        assert "The latent that came in holds NaN" in said["infinity in one of two latents"]
        assert "The latent (or its noise or mask) that came in" in said["minus infinity step by step"]
        assert "The positive conditioning that came in" in said["NaN in a prompt"]
        for case in ("NaN in weights", "NaN in weights step by step"):
            assert "what came in had none, so that the model made them" in said[case]


def test_where_it_is_to_be_an_error_the_node_fails_with_the_same_words(outcomes: Outcomes) -> None:
    ended = {name: outcome["refused"] for name, outcome in each(outcomes) if "refused" in outcome}
    assert len(ended) == 8 and all(text.startswith("NotFiniteError: ") for text in ended.values())
    for name, text in ended.items():
        assert ("step 1 of 2" in text) == ("weights" in name) and ("that came in" in text) == ("weights" not in name)


def test_a_vae_says_what_it_met(outcomes: Outcomes) -> None:
    for cases in outcomes["vae"].values():
        said = {case: outcome["said"] for case, outcome in cases.items()}
        assert all(len(texts) == 1 for case, texts in said.items() if "odd sizes" not in case)
        assert not any(texts for case, texts in said.items() if "odd sizes" in case)
        assert said["decode infinity"][0].startswith("The latent that came in holds NaN or infinity. Look"), (
            "TAESD clamps"
        )
        assert "so does the result" in said["decode NaN in tiles"][0]
        for doing in ("Decod", "Encod"):
            assert f"{doing}ing goes on in tiles of 512 x 512" in said[f"{doing.lower()}e without memory"][0]
