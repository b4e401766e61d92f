"""Remedies followed in a real ComfyUI: what each names works, or ends somewhere; none leads back to where it was given."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfyui.prompts import Link, Prompt, conditioning, mesh, out, sampler, save_latent
from comfyui.server import ComfyServer, Outcome

pytestmark = pytest.mark.usefixtures("comfy_backend")
FILE = "sd3.5-medium.safetensors"


def local_model(prompt: Prompt) -> Link:
    return out(prompt.add("UNETLoader", unet_name=FILE, weight_dtype="default"))


def parallel_model(prompt: Prompt, model: Link) -> Link:
    return out(prompt.add("ParallelizeModel", model=model, mesh=mesh(prompt)))


def picture(server: ComfyServer, prompt: Prompt, node: str, model: Link, **settings: Any) -> Outcome:
    latent = out(prompt.add("EmptySD3LatentImage", width=128, height=96, batch_size=1))
    both = conditioning(prompt, 1), conditioning(prompt, 2)
    save_latent(prompt, sampler(prompt, node, model, *both, latent, steps=2, **settings), "remedies")
    return server.run(prompt.nodes)


def test_what_parallel_sampler_names_for_a_local_model_works(server: ComfyServer) -> None:
    prompt = Prompt()
    refused = picture(server, prompt, "ParallelSampler", local_model(prompt))
    assert "Put Parallelize Model before it, or use KSampler" in refused.message
    prompt = Prompt()
    assert picture(server, prompt, "ParallelSampler", parallel_model(prompt, local_model(prompt))).error is None
    prompt = Prompt()
    assert picture(server, prompt, "KSampler", local_model(prompt)).error is None


@pytest.mark.parametrize("node", ["ParallelSampler", "DisplacedSteps"])
def test_a_model_that_no_node_makes_parallel_is_not_sent_to_one(node: str, server: ComfyServer) -> None:
    prompt = Prompt()
    flux = out(prompt.add("ProbeChangedModel", model=local_model(prompt), how="another family"))
    if node == "ParallelSampler":
        refused = picture(server, prompt, node, flux)
    else:
        displaced = prompt.add(node, model=flux, warmup_steps=1)
        refused = picture(server, prompt, "KSampler", out(displaced))
    assert "one of Flux can't be" in refused.message and "Parallelize" not in refused.message


def test_a_sampler_of_the_backend_alone_says_what_keeps_it_from_there(server: ComfyServer) -> None:
    prompt = Prompt()
    hung = out(prompt.add("Mahiro", model=parallel_model(prompt, local_model(prompt))))
    refused = picture(server, prompt, "ParallelSampler", hung, sampler_name="euler_stochastic")
    assert "The sampler euler_stochastic, which the backend alone has, can't honour " in refused.message
    assert "sampler_post_cfg_function" in refused.message and "Choose another sampler" in refused.message


def test_a_node_that_fails_and_one_that_is_interrupted_say_so_in_their_texts(server: ComfyServer) -> None:
    prompt = Prompt()
    model = parallel_model(prompt, local_model(prompt))
    patched = out(prompt.add("ProbeAttentionPatch", model=model))
    refused = picture(server, prompt, "KSampler", patched)
    node = refused.error["node_id"] if refused.error is not None else ""
    assert refused.error is not None and refused.error["exception_type"] == "parallel_mmdit.UnsupportedError"
    assert refused.texts[node][-1].startswith("Failed: A parallel MODEL can't honour ")
    assert "setting that makes every model parallel off) and KSampler." in refused.texts[node][-1]

    prompt = Prompt()
    latent = out(prompt.add("EmptySD3LatentImage", width=128, height=96, batch_size=1))
    both = conditioning(prompt, 1), conditioning(prompt, 2)
    node, _ = sampler(prompt, "KSampler", parallel_model(prompt, local_model(prompt)), *both, latent, steps=200)
    save_latent(prompt, [node, 0], "interrupted")
    ended = server.run(prompt.nodes, interrupt_at_step=2)
    assert ended.interrupted and ended.texts[node][-1] == "Interrupted"


def test_a_validation_error_has_our_type_and_the_remedy(server: ComfyServer) -> None:
    prompt = Prompt()
    model = out(prompt.add("LoadParallelMMDiT", model_name=FILE, mesh=mesh(prompt, tp=3)))
    refused = json.loads(picture(server, prompt, "KSampler", model).message)
    errors = [error for node in refused["node_errors"].values() for error in node["errors"]]
    types = {error["extra_info"]["exception_type"] for error in errors if "exception_type" in error["extra_info"]}
    assert types == {"parallel_mmdit.ConfigError"}
    assert all("Choose degrees whose product is 2, or a backend of 3 ranks." in error["details"] for error in errors)
