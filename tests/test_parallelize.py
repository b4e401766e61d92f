"""Any loader's MODEL made parallel in a real ComfyUI: by a node on its wire, by another loader, by the setting alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.prompts import Link, Prompt, conditioning, out, sampler, save_latent
from comfyui.server import ComfyServer, Outcome
from safetensors.torch import load_file, save_file
from test_comfyui_nodes import latent_of, local_model
from torch import Tensor

from parallel_backend.checkpoint_files.safetensors_file import safetensors_header
from parallel_backend.small_checkpoints.kl_vae import LdmVaeWeights

pytestmark = pytest.mark.usefixtures("default_backend")
WHOLE, SDXL, LCM = "whole.safetensors", "hollow_sdxl.safetensors", "hollow_lcm.safetensors"
EDM_INPAINTING = "hollow_edm_inpainting.safetensors"
PICKLED = "sub/whole.ckpt"
EVERYWHERE, STATUS = "/parallel_mmdit/everywhere", "/parallel_mmdit/status"
# A loader's node id, and its MODEL, CLIP and VAE.
Loader = Callable[[Prompt], tuple[str, Link, Link, Link]]


@pytest.fixture(scope="module")
def checkpoints(workflow_models: Path) -> Path:
    """An SD3.5 checkpoint of all three parts; UNets of SDXL's, one of which only ComfyUI itself knows, without a value in them."""
    folder = workflow_models / "checkpoints"
    mmdit = load_file(workflow_models / "diffusion_models" / "sd3.5-medium.safetensors")
    clip = load_file(workflow_models / "text_encoders" / "clip_l.safetensors")
    vae = LdmVaeWeights(16, quant=False, width=128, seed=0).tensors
    parts = {
        "model.diffusion_model.": mmdit,
        "text_encoders.clip_l.transformer.": clip,
        "first_stage_model.": {name: tensor.half() for name, tensor in vae.items()},
    }
    save_file(
        {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}, folder / WHOLE
    )
    (folder / PICKLED).parent.mkdir(exist_ok=True)
    torch.save({"state_dict": load_file(folder / WHOLE), "global_step": 7}, folder / PICKLED)
    unet = {
        name: entry["shape"]
        for name, entry in safetensors_header(folder / "sd_xl_base_1.0.safetensors").items()
        if name.startswith("model.diffusion_model.")
    }
    write_hollow(folder / SDXL, unet)
    write_hollow(folder / LCM, unet | {"model.diffusion_model.time_embed.cond_proj.weight": [320, 256]})
    first = {"model.diffusion_model.input_blocks.0.0.weight": [320, 9, 3, 3]}
    write_hollow(folder / EDM_INPAINTING, unet | first | {"edm_mean": [4], "edm_std": [4]})
    return folder


def write_hollow(path: Path, shapes: dict[str, list[int]]) -> None:
    """A file of zeros in fp16, which takes no disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def load_checkpoint(
    prompt: Prompt, node: str = "CheckpointLoaderSimple", ckpt_name: str = WHOLE, **inputs: Any
) -> tuple[str, Link, Link, Link]:
    loader = prompt.add(node, ckpt_name=ckpt_name, **inputs)
    return loader, out(loader), out(loader, 1), out(loader, 2)


def drawn(server: ComfyServer, load: Loader) -> tuple[Outcome, str, Tensor, Tensor]:
    """A small workflow behind a loader of three outputs: its outcome, the loader's id, its latent, an image that it encoded."""
    prompt = Prompt()
    loader, model, clip, vae = load(prompt)
    positive, negative = (out(prompt.add("CLIPTextEncode", clip=clip, text=text)) for text in ("a fox", "blur"))
    empty = out(prompt.add("EmptySD3LatentImage", width=96, height=64, batch_size=1))
    done = save_latent(prompt, sampler(prompt, "KSampler", model, positive, negative, empty, steps=2), "drawn")
    pixels = out(prompt.add("ProbeRandomImage", seed=1, channels=3, height=64, width=48))
    encoded = save_latent(prompt, out(prompt.add("VAEEncode", pixels=pixels, vae=vae)), "encoded")
    outcome = server.run(prompt.nodes)
    return outcome, loader, latent_of(server, outcome, done), latent_of(server, outcome, encoded)


@pytest.fixture(scope="module")
def local(server: ComfyServer, checkpoints: Path) -> tuple[Tensor, Tensor]:
    return drawn(server, load_checkpoint)[2:]


def assert_equal(latents: tuple[Tensor, Tensor], local: tuple[Tensor, Tensor]) -> None:
    for latent, expected in zip(latents, local, strict=True):
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)


def parallelized(prompt: Prompt, ckpt_name: str = WHOLE) -> tuple[str, Link, Link, Link]:
    _, model, clip, vae = load_checkpoint(prompt, ckpt_name=ckpt_name)
    node = prompt.add("ParallelizeModel", model=model)
    return node, out(node), clip, out(prompt.add("ParallelizeVAE", vae=vae))


def swapped(prompt: Prompt) -> tuple[str, Link, Link, Link]:
    return load_checkpoint(prompt, "LoadParallelCheckpoint")


def swapped_with_its_vae(prompt: Prompt) -> tuple[str, Link, Link, Link]:
    return load_checkpoint(prompt, "LoadParallelCheckpoint", parallel_vae=True)


def parallelized_pickle(prompt: Prompt) -> tuple[str, Link, Link, Link]:
    return parallelized(prompt, PICKLED)


def swapped_as_another_machine_names_it(prompt: Prompt) -> tuple[str, Link, Link, Link]:
    name = PICKLED.replace("sub/", "SD35\\large\\")
    return load_checkpoint(prompt, "LoadParallelCheckpoint", name, parallel_vae=True)


LOADS = [parallelized, swapped, swapped_with_its_vae, parallelized_pickle, swapped_as_another_machine_names_it]


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_a_checkpoints_parts_do_as_those_of_load_checkpoint(
    load: Loader, server: ComfyServer, local: tuple[Tensor, Tensor]
) -> None:
    outcome, node, *latents = drawn(server, load)
    assert_equal((latents[0], latents[1]), local)
    report = outcome.texts[node][-1]
    assert "MiB held, in float32" in report
    assert ("2 bands" in report) == (load in (swapped_with_its_vae, swapped_as_another_machine_names_it))


def picture(server: ComfyServer, load: Callable[[Prompt], Link]) -> tuple[Outcome, Tensor]:
    prompt = Prompt()
    empty = out(prompt.add("EmptySD3LatentImage", width=96, height=64, batch_size=1))
    prompts = conditioning(prompt, 1), conditioning(prompt, 2)
    saved = save_latent(prompt, sampler(prompt, "KSampler", load(prompt), *prompts, empty, steps=2), "hung")
    outcome = server.run(prompt.nodes)
    return outcome, latent_of(server, outcome, saved)


def test_what_hangs_on_a_model_comes_along_and_so_does_a_loaders_fp8(server: ComfyServer, models: Path) -> None:
    def shifted(prompt: Prompt) -> Link:
        return out(prompt.add("ModelSamplingSD3", model=local_model(prompt), shift=7.0))

    def shifted_before(prompt: Prompt) -> Link:
        model = out(prompt.add("ParallelizeModel", model=shifted(prompt)))
        twice = out(prompt.add("ParallelizeModel", model=model))
        rescaled = out(prompt.add("RescaleCFG", model=twice, multiplier=0.0))
        return out(prompt.add("ParallelizeModel", model=rescaled, mesh=out(prompt.add("MeshConfig", **LEFT_ALONE))))

    def local_fp8(prompt: Prompt) -> Link:
        return out(prompt.add("UNETLoader", unet_name="sd3.5-medium.safetensors", weight_dtype="fp8_e4m3fn"))

    def fp8(prompt: Prompt) -> Link:
        return out(prompt.add("ParallelizeModel", model=local_fp8(prompt)))

    expected, plain = picture(server, shifted)[1], picture(server, local_model)[1]
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(picture(server, shifted_before)[1], expected, rtol=1e-4, atol=1e-4)
    outcome, latent = picture(server, fp8)
    torch.testing.assert_close(latent, picture(server, local_fp8)[1], rtol=1e-4, atol=1e-4)
    assert (latent - plain).abs().max() > 1e-2
    assert any("weights are cast to float8_e4m3fn" in lines[-1] for lines in outcome.texts.values())


LEFT_ALONE = {
    "ranks": 0, "device": "auto", "devices": "", "cfg": 0, "ulysses": 0, "ring": 1, "tp": 1, "dp": 1, "dtype": "auto",
    "attention": "auto", "backend": "default", "memory_budget_mib": 0, "idle_minutes": 30,
}  # fmt: skip


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no file", "its loader has not left it"),
        ("another loader", "json.loads loaded it"),
        ("own operations", "a pack's own operations (manual_cast)"),
        ("another family", "A MODEL of Flux can't be parallel"),
        ("a replaced forward", "can't honour a replaced forward"),
    ],
)
def test_a_model_that_cant_be_parallel_is_refused_by_name(
    how: str, words: str, server: ComfyServer, models: Path
) -> None:
    prompt = Prompt()
    changed = out(prompt.add("ProbeChangedModel", model=local_model(prompt), how=how))
    prompt.add("ProbeModelClass", model=out(prompt.add("ParallelizeModel", model=changed)))
    assert words in server.run(prompt.nodes).message


def test_taesd_is_refused_with_the_node_that_has_it(server: ComfyServer, models: Path) -> None:
    prompt = Prompt()
    vae = out(prompt.add("ParallelizeVAE", vae=out(prompt.add("VAELoader", vae_name="taesd3"))))
    latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=8, width=8))
    prompt.add("PreviewImage", images=out(prompt.add("VAEDecode", samples=latent, vae=vae)))
    assert "Patch Parallel VAE" in server.run(prompt.nodes).message


def model_classes(server: ComfyServer, *checkpoints: str) -> list[str]:
    """Of the MODELs that Load Checkpoint gives for these, and of one from Load Diffusion Model."""
    prompt = Prompt()
    models = [out(prompt.add("CheckpointLoaderSimple", ckpt_name=name)) for name in checkpoints]
    nodes = [prompt.add("ProbeModelClass", model=model) for model in (*models, local_model(prompt))]
    outputs = server.run(prompt.nodes).outputs
    return [outputs[node]["text"][0] for node in nodes]


def test_the_setting_makes_unchanged_prompts_parallel_and_off_again_local(
    server: ComfyServer, local: tuple[Tensor, Tensor]
) -> None:
    told = server.get(STATUS)["everywhere"]
    assert told == {"on": False, "said_by": told["said_by"], "parallel": [], "local": {}}
    assert model_classes(server) == ["ModelPatcher"]
    assert server.post(EVERYWHERE, {"on": "yes"})["error"].startswith("The body is")
    assert server.post(EVERYWHERE, {"on": True})["on"] is True
    try:
        outcome, loader, *latents = drawn(server, load_checkpoint)
        assert_equal((latents[0], latents[1]), local)
        assert "MiB held, in float32" in outcome.texts[loader][-1]
        parallel = [SDXL, EDM_INPAINTING, PICKLED]
        classes = model_classes(server, LCM, *parallel)
        assert classes == ["ModelPatcher", *["RemotePatcher"] * 4]
        told = server.get(STATUS)["everywhere"]
        drawn_with = ["sd3.5-medium.safetensors", WHOLE, "whole.ckpt"]
        assert told["on"] and told["parallel"] == sorted([*parallel[:2], *drawn_with])
        assert "guidance embedding" in told["local"][LCM]
    finally:
        server.post(EVERYWHERE, {"on": False})
    assert model_classes(server) == ["ModelPatcher"], "the very same prompt as before: nothing of it was kept"
    assert server.get(STATUS)["everywhere"] == {"on": False, "said_by": "request", "parallel": [], "local": {}}


def test_the_editor_has_the_setting(server: ComfyServer) -> None:
    script = "/extensions/parallel-mmdit/everywhere.js"
    assert script in server.get("/extensions")
    text = server.get_text(script)
    assert 'id: "ParallelMMDiT.Everywhere"' in text and "defaultValue: false" in text and EVERYWHERE in text
