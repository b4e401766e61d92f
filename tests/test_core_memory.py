"""Parallel models under a real ComfyUI's memory manager: it counts what ranks hold beside it, lets them leave, and they come back."""

from __future__ import annotations

import json

import pytest
import torch
from comfyui.prompts import Prompt, conditioning, mesh, out, sampler, save_latent
from comfyui.server import ComfyServer
from test_comfyui_nodes import latent_of, parallel_model, picture
from torch import Tensor

from parallel_backend import Backend

pytestmark = pytest.mark.usefixtures("comfy_backend")
MODEL, VAE = "sd3.5-medium.safetensors", "sd3_vae.safetensors"


def asked(server: ComfyServer, how: str) -> tuple[dict[str, float], dict[str, float]]:
    """What ComfyUI believes to be loaded of ours, before and after it was asked for room, in a prompt that has no model."""
    prompt = Prompt()
    node = prompt.add("ProbeCoreMemory", how=how)
    outcome = server.run(prompt.nodes)
    assert outcome.error is None, outcome.error
    before, after = json.loads(outcome.outputs[node]["text"][0])
    return dict(before), dict(after)


def resident(backend: Backend) -> dict[str, float]:
    """What the ranks hold, in MiB of all of them together."""
    state = backend.status()
    return {model.name: len(state.ranks) * model.rank_bytes / 2**20 for model in state.models}


def decoded(server: ComfyServer, node: str) -> Tensor:
    prompt = Prompt()
    model = parallel_model(prompt)
    positive, negative = conditioning(prompt, 1), conditioning(prompt, 2)
    empty = out(prompt.add("EmptySD3LatentImage", width=64, height=64, batch_size=1))
    latent = sampler(prompt, node, model, positive, negative, empty, steps=2)
    vae = out(prompt.add("PatchParallelVAE", vae_name=VAE, mesh=mesh(prompt)))
    image = out(prompt.add("VAEDecode", samples=latent, vae=vae))
    saved = save_latent(prompt, out(prompt.add("VAEEncode", pixels=image, vae=vae)), "decoded")
    return latent_of(server, server.run(prompt.nodes), saved)


@pytest.mark.parametrize(("how", "node"), [("free_memory", "KSampler"), ("unload_all_models", "ParallelSampler")])
def test_weights_leave_when_comfyui_wants_the_room_and_come_back(how: str, node: str, server: ComfyServer) -> None:
    asked(server, "unload_all_models")  # what other tests have loaded
    expected = decoded(server, node)
    backend = Backend.attach("comfy")
    held = resident(backend)
    # The workflow that had them is gone from ComfyUI's cache by now; what the ranks hold is counted all the same.
    before, after = asked(server, how)
    assert before == {"RemotePatcher": held[MODEL], "VAEWeights": held[VAE]} and not after
    assert not {MODEL, VAE} & set(resident(backend))
    torch.testing.assert_close(decoded(server, node), expected, rtol=1e-4, atol=1e-4)
    assert {MODEL, VAE} <= set(resident(backend))
    backend.close()


def test_what_left_is_loaded_again_for_a_model_that_comfyui_has_cached(server: ComfyServer) -> None:
    def graph(how: str, seed: int) -> tuple[Prompt, str]:
        prompt = Prompt()
        prompt.add("ProbeCoreMemory", how=how)
        return prompt, picture(prompt, "KSampler", parallel_model(prompt), "cached", seed=seed)

    backend = Backend.attach("comfy")
    for how, seed, there in (("look", 1, True), ("free_memory", 1, False), ("look", 2, True)):
        prompt, saved = graph(how, seed)
        outcome = server.run(prompt.nodes)
        assert outcome.error is None, outcome.error
        assert (MODEL in resident(backend)) is there, how
    assert "LoadParallelMMDiT" not in [prompt.nodes[node]["class_type"] for node in outcome.executed]
    assert torch.isfinite(latent_of(server, outcome, saved)).all()
    backend.close()
