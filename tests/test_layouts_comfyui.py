"""Names of files that a workflow brings from elsewhere, in a real ComfyUI: found, or told before anything runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from comfyui.prompts import Link, Prompt, mesh, out
from comfyui.server import ComfyServer
from reference_models import diffusers_mmdit
from safetensors.torch import load_file, save_file
from test_comfyui_nodes import local_model
from test_parallelize import EVERYWHERE, STATUS, picture
from torch import Tensor

from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

pytestmark = pytest.mark.usefixtures("comfy_backend")
REAL = "sd3.5-medium.safetensors"
# In a workflow, and of the folders below.
NAMES = {
    "of Windows": "layouts\\one\\named.safetensors",
    "moved": "SD35/old/named.safetensors",
    "moved on Windows": "SD35\\named.safetensors",
    "a folder called checkpoints": "checkpoints/inner.safetensors",
    "the folder checkpoints": "checkpoints/layouts/outer.ckpt",
    "the folder checkpoints, moved": "checkpoints\\outer.ckpt",
    "a pipeline": "diffusers/layouts/pipeline",
    "a link": "layouts/link.safetensors",
}


@pytest.fixture(scope="module")
def placed(models: Path) -> Path:
    """The same model in all these places."""
    folder, tensors = models / "diffusion_models", load_file(models / "diffusion_models" / REAL)
    for name in ("layouts/one/named.safetensors", "checkpoints/inner.safetensors", "layouts/blobs/0123abcd"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / REAL).read_bytes())
    (folder / "layouts" / "link.safetensors").symlink_to("blobs/0123abcd")
    save_file({f"net.{name}": t for name, t in tensors.items()} | {"extra": torch.zeros(1)}, folder / "layouts/net.sft")
    torch.save(tensors, folder / "layouts" / "plain.pth")
    for name in ("layouts/a/twice.safetensors", "layouts/b/twice.safetensors"):
        write_mmdit(folder / name, small_config("sd3.5-medium", 1))
    outer = models / "checkpoints" / "layouts" / "outer.ckpt"
    outer.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"model.diffusion_model.{name}": t for name, t in tensors.items()}}, outer)
    pipeline = models / "diffusers" / "layouts" / "pipeline"
    theirs = diffusers_mmdit(small_config("sd3.5-medium"), tensors)
    theirs.save_pretrained(pipeline / "transformer", max_shard_size="20MB")
    theirs.save_pretrained(folder / "layouts" / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    return models


@pytest.fixture(scope="module")
def expected(server: ComfyServer, placed: Path) -> Tensor:
    return picture(server, local_model)[1]


@pytest.mark.parametrize("case", NAMES)
def test_a_name_from_elsewhere_draws_the_local_picture(case: str, server: ComfyServer, expected: Tensor) -> None:
    def load(prompt: Prompt) -> Link:
        return out(prompt.add("LoadParallelMMDiT", model_name=NAMES[case], mesh=mesh(prompt)))

    outcome, latent = picture(server, load)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    lines = [line for told in outcome.texts.values() for line in told]
    assert any(line.startswith("There is no ") for line in lines) == ("moved" in case)
    assert not any("0123abcd" in line for line in lines)


@pytest.mark.parametrize(
    ("node", "field", "name", "words"),
    [
        ("LoadParallelMMDiT", "model_name", "SD35\\twice.safetensors", "Several have its file name: layouts/a/twice"),
        (
            "LoadParallelMMDiT",
            "model_name",
            "x/diffusion_pytorch_model.safetensors",
            "There is no 'x/diffusion_pytorch",
        ),
        ("LoadParallelUNet", "model_name", "nowhere.safetensors", "There is no 'nowhere.safetensors'"),
        ("LoadParallelCheckpoint", "ckpt_name", "nowhere.ckpt", "in ComfyUI's checkpoints folder"),
        ("PatchParallelVAE", "vae_name", "nowhere.pt", "in ComfyUI's vae folder"),
    ],
)
def test_a_name_that_isnt_found_is_told_before_anything_runs(
    node: str, field: str, name: str, words: str, server: ComfyServer, placed: Path
) -> None:
    prompt = Prompt()
    loader = prompt.add(node, mesh=mesh(prompt), **{field: name})
    if node == "PatchParallelVAE":
        latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=8, width=8))
        prompt.add("PreviewImage", images=out(prompt.add("VAEDecode", samples=latent, vae=out(loader))))
    else:
        prompt.add("ProbeModelClass", model=out(loader))
    outcome = server.run(prompt.nodes)
    assert words in outcome.message and outcome.executed == []


OF_EVERY_LAYOUT = (
    *("layouts/net.sft", "layouts/plain.pth", "layouts/link.safetensors"),
    "layouts/transformer/diffusion_pytorch_model.safetensors",
)


def test_the_setting_takes_files_of_every_layout(
    server: ComfyServer, placed: Path, expected: Tensor, default_backend: str
) -> None:
    assert server.post(EVERYWHERE, {"on": True})["on"] is True
    try:
        for name in OF_EVERY_LAYOUT:
            latent = picture(server, partial(local_model, name=name))[1]
            torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
        told = server.get(STATUS)["everywhere"]
        assert told["parallel"] == sorted(Path(name).name for name in OF_EVERY_LAYOUT) and told["local"] == {}
    finally:
        server.post(EVERYWHERE, {"on": False})


VAES = {"sub\\sd3.pt": "kl-16", "diffusers/layouts/with_vae": "kl-16", "SD3\\taesd3": "taesd3", "pth\\taesd3": "taesd3"}


@pytest.mark.parametrize("name", VAES)
def test_a_vae_is_found_under_a_name_from_elsewhere(name: str, server: ComfyServer, models: Path) -> None:
    for part in ("encoder", "decoder"):
        approx = models / "vae_approx"
        for folder, suffix in (("SD3", "safetensors"), ("pth", "pth")):
            (approx / folder).mkdir(exist_ok=True)
            tensors = load_file(approx / f"taesd3_{part}.safetensors")
            save = save_file if suffix == "safetensors" else torch.save
            save(tensors, approx / folder / f"taesd3_{part}.{suffix}")
    tensors = load_file(models / "vae" / "sd3_vae.safetensors")
    (models / "vae" / "sub").mkdir(exist_ok=True)
    torch.save(tensors, models / "vae" / "sub" / "sd3.pt")
    pipeline = models / "diffusers" / "layouts" / "with_vae"
    for part in ("vae", "transformer"):
        (pipeline / part).mkdir(parents=True, exist_ok=True)
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        (models / "vae" / "sd3_vae.safetensors").read_bytes()
    )
    prompt = Prompt()
    vae = prompt.add("PatchParallelVAE", vae_name=name, mesh=mesh(prompt))
    latent = out(prompt.add("ProbeRandomLatent", seed=1, channels=16, height=8, width=8))
    prompt.add("PreviewImage", images=out(prompt.add("VAEDecode", samples=latent, vae=out(vae))))
    outcome = server.run(prompt.nodes)
    assert outcome.error is None, outcome.message
    assert outcome.texts[vae][-1].startswith((f"{VAES[name]}: read", f"{VAES[name]}: already resident"))
