"""Quantised files behind the nodes of a real ComfyUI: in its own loaders' wires, in this pack's loaders, in a checkpoint."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comfyui.installation import ComfyInstallation
from comfyui.prompts import Link, Prompt, out
from comfyui.server import GGUF_PACK, ComfyServer, Outcome
from quantised_files import bitsandbytes, scaled_fp8, write_gguf
from safetensors.torch import load_file, save_file
from test_comfyui_nodes import local_model
from test_parallelize import LEFT_ALONE, drawn, picture

from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.kl_vae import LdmVaeWeights

pytestmark = pytest.mark.usefixtures("default_backend")
SCALED, Q8, COPIED = "scaled_fp8.safetensors", "folder/q8_0.gguf", "folder/q8_0_again.gguf"
WHOLE, NF4, OF_NF4 = "whole_fp8.safetensors", "nf4.safetensors", "values_of_nf4.safetensors"


@pytest.fixture(scope="module", autouse=True)
def files(workflow_models: Path) -> Path:
    folder = workflow_models / "diffusion_models"
    dense = load_file(folder / "sd3.5-medium.safetensors")
    save_file(scaled_fp8(dense), folder / SCALED)
    save_file(bitsandbytes(dense, nested=True), folder / NF4)
    save_file({name: tensor.contiguous() for name, tensor in WholeFile(folder / NF4).items()}, folder / OF_NF4)
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


def loaded(name: str, dtype: str = "auto") -> Callable[[Prompt], Link]:
    settings = LEFT_ALONE | {"dtype": dtype}
    return lambda prompt: out(
        prompt.add("LoadParallelMMDiT", model_name=name, mesh=out(prompt.add("MeshConfig", **settings)))
    )


def test_scaled_fp8_draws_as_comfyuis_own_loader(server: ComfyServer) -> None:
    expected = picture(server, scaled_model)[1]
    outcome, latent = picture(server, parallelized(scaled_model))
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    assert any("weights stay quantised" in said for said in said_by(outcome))
    torch.testing.assert_close(picture(server, loaded(SCALED))[1], expected, rtol=1e-4, atol=1e-4)


def test_nf4_draws_as_its_values_or_says_what_it_needs(server: ComfyServer, comfy: ComfyInstallation) -> None:
    asked = subprocess.run([comfy.python, "-c", "import bitsandbytes.functional"], capture_output=True, check=False)
    if asked.returncode:
        prompt = Prompt()
        prompt.add("ProbeModelClass", model=loaded(NF4)(prompt))
        assert "bitsandbytes, which is not installed" in server.run(prompt.nodes).message
        return
    expected = picture(server, lambda prompt: local_model(prompt, OF_NF4))[1]
    torch.testing.assert_close(picture(server, loaded(NF4))[1], expected, rtol=1e-4, atol=1e-4)


def test_mesh_configs_fp8_is_said_and_near_to_the_files_own_picture(server: ComfyServer) -> None:
    own = picture(server, local_model)[1]
    outcome, latent = picture(server, loaded("sd3.5-medium.safetensors", "fp8"))
    assert 1e-4 < (latent - own).std() < 0.1 * own.std()
    assert any("held in fp8, each row scaled; computed in float32" in said for said in said_by(outcome))


def said_by(outcome: Outcome) -> list[str]:
    return [line for lines in outcome.texts.values() for line in lines]


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
