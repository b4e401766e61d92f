"""Quantised files behind the nodes of a real ComfyUI: in its own loaders' wires, in this pack's loaders, in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui.installation import ComfyInstallation
from comfyui.prompts import Link, Prompt, out
from comfyui.server import GGUF_PACK, ComfyServer
from quantised_files import scaled_fp8, write_gguf
from safetensors.torch import load_file, save_file
from test_comfyui_nodes import local_model
from test_parallelize import LEFT_ALONE, drawn, picture

from parallel_backend.small_checkpoints.kl_vae import LdmVaeWeights

pytestmark = pytest.mark.usefixtures("default_backend")
SCALED, Q8, COPIED = "scaled_fp8.safetensors", "folder/q8_0.gguf", "folder/q8_0_again.gguf"
WHOLE = "whole_fp8.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(workflow_models: Path) -> Path:
    folder = workflow_models / "diffusion_models"
    dense = load_file(folder / "sd3.5-medium.safetensors")
    save_file(scaled_fp8(dense), folder / SCALED)
    (folder / "folder").mkdir(exist_ok=True)
    for name in (Q8, COPIED):
        write_gguf(folder / name, dense, "Q8_0")
    vae = LdmVaeWeights(16, quant=False, width=128, seed=0).tensors
    clip = load_file(workflow_models / "text_encoders" / "clip_l.safetensors")
    parts = {f"model.diffusion_model.{name}": tensor for name, tensor in scaled_fp8(dense).items()}
    parts |= {f"first_stage_model.{name}": tensor.half() for name, tensor in vae.items()}
    parts |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in clip.items()}
    save_file(parts, workflow_models / "checkpoints" / WHOLE)
    return folder


@pytest.fixture
def gguf_pack(comfy: ComfyInstallation) -> None:
    if not (Path(comfy.folder) / GGUF_PACK).is_dir():
        pytest.skip("ComfyUI-GGUF is not among this ComfyUI's custom nodes")


def gguf_model(prompt: Prompt, name: str = Q8) -> Link:
    return out(prompt.add("UnetLoaderGGUF", unet_name=name))


def scaled_model(prompt: Prompt) -> Link:
    return local_model(prompt, SCALED)


def parallelized(load: Callable[[Prompt], Link]) -> Callable[[Prompt], Link]:
    return lambda prompt: out(prompt.add("ParallelizeModel", model=load(prompt)))


def loaded(name: str) -> Callable[[Prompt], Link]:
    return lambda prompt: out(
        prompt.add("LoadParallelMMDiT", model_name=name, mesh=out(prompt.add("MeshConfig", **LEFT_ALONE)))
    )


def test_scaled_fp8_draws_as_comfyuis_own_loader(server: ComfyServer) -> None:
    expected = picture(server, scaled_model)[1]
    outcome, latent = picture(server, parallelized(scaled_model))
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert any("weights stay quantised" in line for lines in outcome.texts.values() for line in lines)
    torch.testing.assert_close(picture(server, loaded(SCALED))[1], expected, rtol=1e-4, atol=1e-4)


def test_gguf_draws_as_comfyui_gguf(server: ComfyServer, gguf_pack: None) -> None:
    own = picture(server, parallelized(gguf_model))[1]
    expected = picture(server, gguf_model)[1]
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(picture(server, loaded(Q8))[1], expected, rtol=1e-4, atol=1e-4)


def test_gguf_that_was_sampled_from_is_refused_with_what_can(server: ComfyServer, gguf_pack: None) -> None:
    prompt = Prompt()
    model = gguf_model(prompt, COPIED)
    used = out(prompt.add("ProbeChangedModel", model=model, how="weights copied"))
    prompt.add("ProbeModelClass", model=out(prompt.add("ParallelizeModel", model=used)))
    assert "Load Parallel MMDiT or UNet, which list GGUF files" in server.run(prompt.nodes).message


def test_a_whole_checkpoint_of_scaled_fp8(server: ComfyServer) -> None:
    def load(node: str) -> Callable[[Prompt], tuple[str, Link, Link, Link]]:
        def add(prompt: Prompt) -> tuple[str, Link, Link, Link]:
            loader = prompt.add(node, ckpt_name=WHOLE)
            return loader, out(loader), out(loader, 1), out(loader, 2)

        return add

    expected, parallel = (
        drawn(server, load(node))[2:] for node in ("CheckpointLoaderSimple", "LoadParallelCheckpoint")
    )
    for latent, wanted in zip(parallel, expected, strict=True):
        torch.testing.assert_close(latent, wanted, rtol=1e-4, atol=1e-4)
