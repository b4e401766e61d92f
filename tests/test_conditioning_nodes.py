"""Save and Load Conditioning in a real ComfyUI: what a file of them keeps, where it lies, and what it can't hold."""

from __future__ import annotations

import pytest
import torch
from comfyui.prompts import Prompt, conditioning, out, sampler, save_latent
from comfyui.server import ComfyServer
from test_comfyui_nodes import latent_of, local_model, picture, refused

pytestmark = pytest.mark.usefixtures("comfy_backend")


def test_conditioning_comes_back_from_its_file(server: ComfyServer) -> None:
    prompt = Prompt()
    made = picture(prompt, "KSampler", local_model(prompt), "made")
    for seed, tokens in ((1, 154), (2, 77)):
        prompt.add("SaveConditioning", conditioning=conditioning(prompt, seed, tokens), filename_prefix=f"kept{seed}")
    outcome = server.run(prompt.nodes)
    local = latent_of(server, outcome, made)
    names = sorted(output["text"][0] for output in outcome.outputs.values() if output and "text" in output)
    assert [name[:5] for name in names] == ["kept1", "kept2"]

    prompt = Prompt()
    positive, negative = (out(prompt.add("LoadConditioning", name=name)) for name in names)
    empty = out(prompt.add("EmptySD3LatentImage", width=160, height=96, batch_size=1))
    node = save_latent(prompt, sampler(prompt, "KSampler", local_model(prompt), positive, negative, empty), "loaded")
    torch.testing.assert_close(latent_of(server, server.run(prompt.nodes), node), local, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("prefix", "kept"),
    [
        ("", "conditioning_0"),
        ("named/", "named/conditioning_0"),
        (".hidden", "hidden_0"),
        ("named/..", "named/conditioning_0"),
        ("a.b", "a.b_0"),
    ],
)
def test_no_prefix_makes_a_hidden_file(prefix: str, kept: str, server: ComfyServer) -> None:
    prompt = Prompt()
    prompt.add("SaveConditioning", conditioning=conditioning(prompt, 1, 7), filename_prefix=prefix)
    ((text,),) = (output["text"] for output in server.run(prompt.nodes).outputs.values())
    assert text.startswith(kept)
    assert (server.base / "output" / text.removesuffix(" [output]")).is_file()


def test_entries_that_share_a_tensor_are_kept(server: ComfyServer) -> None:
    prompt = Prompt()
    one = conditioning(prompt, 1, 77)
    twice = out(prompt.add("ConditioningCombine", conditioning_1=one, conditioning_2=one))
    prompt.add("SaveConditioning", conditioning=twice, filename_prefix="twice")
    outcome = server.run(prompt.nodes)
    assert outcome.error is None
    assert [output["text"][0][:5] for output in outcome.outputs.values()] == ["twice"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("../secret.safetensors", "There is no conditioning file"), ("absent.safetensors", "There is no conditioning")],
)
def test_conditioning_files_that_arent_there_are_refused(name: str, words: str, server: ComfyServer) -> None:
    prompt = Prompt()
    prompt.add("SaveConditioning", conditioning=out(prompt.add("LoadConditioning", name=name)), filename_prefix="no")
    assert words in refused(server, prompt)


def test_what_a_conditioning_file_cant_hold_is_refused_by_name(server: ComfyServer) -> None:
    prompt = Prompt()
    odd = conditioning(prompt, 1, hooked=True)
    prompt.add("SaveConditioning", conditioning=odd, filename_prefix="no")
    assert "Entry 1 has 'hooks', a object, which a file can't hold" in refused(server, prompt)
