"""Workflows in a real ComfyUI that ask for other ranks, or another budget, than the backend has that runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.prompts import Prompt, conditioning, mesh, out, sampler, save_latent
from comfyui.server import ComfyServer, Outcome
from safetensors.torch import load_file
from torch import Tensor

from parallel_backend import Backend
from parallel_backend.client.ending import end

ROOT = Path(__file__).parents[1]
NAME = "turns"


@pytest.fixture
def turns(server: ComfyServer) -> Iterator[str]:
    """The name of the backend that these prompts start."""
    yield NAME
    end(NAME)


def workflow(ranks: int, seed: int, prompt: Prompt | None = None, **settings: Any) -> tuple[Prompt, dict[str, str]]:
    """A small picture on so many ranks, in a prompt of its own or beside others; the ids of its nodes by what they do."""
    prompt = prompt or Prompt()
    of_ranks = mesh(prompt, NAME, ranks=ranks, **settings)
    model = out(prompt.add("LoadParallelMMDiT", model_name="sd3.5-medium.safetensors", mesh=of_ranks))
    positive, negative = conditioning(prompt, 1, 154), conditioning(prompt, 2)
    empty = out(prompt.add("EmptySD3LatentImage", width=160, height=96, batch_size=1))
    done = sampler(prompt, "KSampler", model, positive, negative, empty, seed=seed)
    return prompt, {"model": model[0], "sampler": done[0], "saved": save_latent(prompt, done, f"ranks-{ranks}")}


def latent(server: ComfyServer, outcome: Outcome, saved: str) -> Tensor:
    assert outcome.error is None, outcome.error
    found = outcome.outputs[saved]["latents"][0]
    return load_file(server.base / "output" / found["subfolder"] / found["filename"])["latent_tensor"]


def test_two_ranks_then_one_then_two_without_a_hand(server: ComfyServer, turns: str) -> None:
    latents = []
    told = ("", "it had 2 ranks, 1 is asked for", "it had 1 rank, 2 are asked for")
    for ranks, said in zip((2, 1, 2), told, strict=True):
        prompt, nodes = workflow(ranks, seed=7)
        outcome = server.run(prompt.nodes)
        latents.append(latent(server, outcome, nodes["saved"]))
        lines = outcome.texts[nodes["model"]]
        assert any(line.startswith(f"starting backend 'turns': {ranks} ranks: importing torch, ") for line in lines), (
            lines
        )
        assert any(line.startswith("loading sd3.5-medium.safetensors: ") for line in lines), lines
        assert said in lines[-1] and ("Restarted backend 'turns'" in lines[-1]) == bool(said), lines
    for other in latents[1:]:
        torch.testing.assert_close(other, latents[0], rtol=1e-4, atol=1e-4)


def test_models_that_comfyui_has_kept_get_their_ranks_again(server: ComfyServer, turns: str) -> None:
    """Two in one prompt: at the second run their loaders' outputs are there, and each asks for its own ranks."""
    latents, said = [], list[str]()
    for seed in (8, 9):
        prompt, two = workflow(2, seed)
        _, one = workflow(1, seed, prompt)
        outcome = server.run(prompt.nodes)
        ours = [latent(server, outcome, nodes["saved"]) for nodes in (two, one)]
        torch.testing.assert_close(*ours, rtol=1e-4, atol=1e-4)
        latents.append(ours[0])
        said = [line for nodes in (two, one) for line in outcome.texts[nodes["sampler"]]]
    assert not {two["model"], one["model"]} & set(outcome.executed)
    assert sum("Restarted backend 'turns'" in line for line in said) >= 1, said
    assert any(line.startswith("loading sd3.5-medium.safetensors: ") for line in said), said
    assert not torch.equal(*latents)


def test_a_backend_that_somebody_else_works_with_is_named_on_the_node(server: ComfyServer, turns: str) -> None:
    prompt, _ = workflow(2, seed=101)
    code = f"from parallel_backend import Backend\nbackend = Backend(2, 'cpu', '{NAME}')\nprint('there', flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "there\n"
        assert server.run(prompt.nodes).error is None
        refused, _ = workflow(1, seed=102)
        outcome = server.run(refused.nodes)
        said = f"Backend 'turns' has 2 ranks, 1 is asked for, and is in use: others are connected (pid {other.pid})."
        assert said in outcome.message and "Press Restart in the Parallel MMDiT panel" in outcome.message
        other.communicate("\n")
    assert server.run(refused.nodes).error is None


def test_another_budget_and_idle_time_are_taken_over_and_said(server: ComfyServer, turns: str) -> None:
    prompt, nodes = workflow(2, seed=201)
    assert server.run(prompt.nodes).error is None
    backend = Backend.attach(NAME)
    generation = backend.generation
    prompt, nodes = workflow(2, seed=202, memory_budget_mib=500, idle_minutes=20)
    outcome = server.run(prompt.nodes)
    said = outcome.texts[nodes["model"]][-1]
    assert "taken over: memory budget 500 MiB a rank (was none), idle time 20 min (was 30)" in said
    state = backend.status()
    assert (state.memory_budget, state.idle_seconds, state.generation) == (500 * 2**20, 1200, generation)
    prompt, nodes = workflow(2, seed=203, memory_budget_mib=1)
    assert "the budget is 1 MiB" in server.run(prompt.nodes).message
    backend.close()
