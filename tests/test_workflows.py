"""Every file in workflows/, run through a real ComfyUI on small checkpoints of the names that they ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui.server import ComfyServer, Outcome
from PIL import Image
from safetensors.torch import load_file, save_file
from ui_workflow import WORKFLOWS, Template, api_prompt, templates

from parallel_backend.demo.scenes import COLORS, parse
from parallel_backend.demo.score import label_colors, shows
from parallel_backend.demo.trained import MMDIT
from parallel_backend.small_checkpoints.kl_vae import LdmVaeWeights
from parallel_backend.small_checkpoints.unet import CONFIGS
from parallel_backend.small_checkpoints.unet_control import control_config, write_unet_control

TWINS = sorted((WORKFLOWS / "api").glob("*.json"))
SIZE, STEPS = 128, 3
VAE = "first_stage_model."
# ComfyUI's own loader knows VAEs of the true width alone.
BASE, TRUE_VAE = "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_true_vae.safetensors"


Picture = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def editor(server: ComfyServer, default_backend: str, workflow_models: Path) -> ComfyServer:
    """A ComfyUI with the files that the workflows name; a picture to load, with a mask painted on it."""
    pixels = torch.rand(300, 400, 4, generator=torch.Generator().manual_seed(0))
    pixels[..., 3] = 1
    pixels[100:200, 150:250, 3] = 0
    Image.fromarray((pixels * 255).byte().numpy()).save(server.base / "input" / "example.png")
    narrow = load_file(workflow_models / "checkpoints" / BASE)
    parts = {name: tensor for name, tensor in narrow.items() if not name.startswith(VAE)}
    vae = LdmVaeWeights(4, quant=True, width=128, seed=0).tensors
    parts |= {VAE + name: tensor.half() for name, tensor in vae.items()}
    save_file(parts, workflow_models / "checkpoints" / TRUE_VAE)
    return server


@pytest.fixture(scope="module")
def object_info(editor: ComfyServer) -> dict[str, Any]:
    return editor.get("/object_info")


@pytest.fixture(scope="module")
def pictures(editor: ComfyServer) -> Callable[[Path], Picture]:
    """`run`, once for each workflow."""
    return cache(partial(run, editor))


@pytest.mark.parametrize("template", templates(), ids=lambda template: template.name)
def test_the_editors_form_is_made_of_the_api_form(template: Template, object_info: dict[str, Any]) -> None:
    workflow = json.loads(template.path.read_text())
    assert template.workflow(object_info) == workflow, "run scripts/ui_workflow.py"
    assert api_prompt(workflow, object_info) == template.prompt


def small(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same graph at a size that two cores sample in seconds."""
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {"width": SIZE, "height": SIZE} if "width" in inputs else {}
        inputs |= {"steps": STEPS} if "steps" in inputs else {}
        inputs |= {"warmup_steps": 1} if "warmup_steps" in inputs else {}
        inputs |= {"megapixels": SIZE**2 / 2**20} if "megapixels" in inputs else {}
        inputs |= {"ckpt_name": TRUE_VAE} if inputs.get("ckpt_name") == BASE else {}
    return prompt


def run(editor: ComfyServer, path: Path) -> Picture:
    """The picture that the workflow saves; those of the demo are small as they are. Models of the others leave after it."""
    prompt = json.loads(path.read_text())
    if is_demo(path):
        return picture_of(editor, prompt)
    picture = picture_of(editor, small(prompt))
    editor.post("/free", {"unload_models": True, "free_memory": True})
    return picture


def is_demo(path: Path) -> bool:
    return path.stem.startswith("demo")


def picture_of(editor: ComfyServer, prompt: dict[str, Any]) -> Picture:
    outcome = editor.run(prompt)
    assert outcome.error is None, outcome.error
    (save,) = (node_id for node_id, node in prompt.items() if node["class_type"] == "SaveImage")
    return np.asarray(saved(editor, outcome, save))


def saved(editor: ComfyServer, outcome: Outcome, node_id: str) -> Image.Image:
    image = outcome.outputs[node_id]["images"][0]
    return Image.open(editor.base / image["type"] / image["subfolder"] / image["filename"])


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_workflow_saves_a_picture(path: Path, pictures: Callable[[Path], Picture]) -> None:
    picture = pictures(path)
    side = 128 if is_demo(path) else 3 * SIZE // 2 if "hires" in path.stem else SIZE
    assert picture.shape == (side, side, 3) and picture.std() > 0


def test_what_the_mask_leaves_out_is_as_it_was(editor: ComfyServer, pictures: Callable[[Path], Picture]) -> None:
    """The hole is a third of the picture's height, a bit left of its middle."""
    picture = pictures(WORKFLOWS / "api" / "sdxl_inpainting.json").astype(int)
    whole = Image.open(editor.base / "input" / "example.png").convert("RGB").crop((50, 0, 350, 300))
    before = np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.LANCZOS)).astype(int)
    hole = np.zeros((SIZE, SIZE), dtype=bool)
    hole[40:88, 40:88] = True
    assert np.abs(picture - before)[~hole].max() <= 1 < np.abs(picture - before)[45:83, 45:83].mean()


LOCAL = {
    "sdxl_controlnet": {"3": ("CheckpointLoaderSimple", {"ckpt_name": TRUE_VAE})},
    "sd35_canny": {
        "2": ("UNETLoader", {"unet_name": "sd3.5-large.safetensors", "weight_dtype": "default"}),
        "9": ("ControlNetLoader", {"control_net_name": "sd3.5_large_controlnet_canny.safetensors"}),
    },
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_controlnet_draws_what_it_draws_in_stock_comfyui(
    name: str, editor: ComfyServer, pictures: Callable[[Path], Picture]
) -> None:
    path = WORKFLOWS / "api" / f"{name}.json"
    prompt = small(json.loads(path.read_text()))
    for node_id, (kind, inputs) in LOCAL[name].items():
        prompt[node_id] |= {"class_type": kind, "inputs": inputs}
    stock = picture_of(editor, prompt)
    assert np.abs(stock.astype(int) - pictures(path).astype(int)).max() <= 1


def test_a_controlnet_of_differences_is_laid_on_a_parallel_models_weights(
    editor: ComfyServer, workflow_models: Path
) -> None:
    file = workflow_models / "controlnet" / "difference.safetensors"
    mark, koala = {"difference": torch.tensor([])}, control_config(CONFIGS["koala"])
    write_unet_control(file, koala, "single file", prefix="control_model.", dtype=torch.float16, extra=mark)
    prompt = small(json.loads((WORKFLOWS / "api" / "sdxl_controlnet.json").read_text()))
    loaded = {"model": ["3", 0], "control_net_name": file.name}
    prompt["10"] |= {"class_type": "DiffControlNetLoader", "inputs": loaded}
    ours = picture_of(editor, prompt)
    loaded["model"] = prompt["13"]["inputs"]["model"] = ["2", 0]
    assert np.abs(picture_of(editor, prompt).astype(int) - ours.astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["sd35", "demo", "demo_sdxl"])
def test_both_samplers_give_one_picture(name: str, pictures: Callable[[Path], Picture]) -> None:
    both = [pictures(WORKFLOWS / "api" / f"{name}_text_to_image{end}.json") for end in ("", "_ksampler")]
    difference = np.abs(both[0].astype(int) - both[1].astype(int))
    assert difference.max() <= 1


def test_the_demos_picture_shows_its_caption_on_our_ranks_and_in_stock_comfyui(
    editor: ComfyServer, workflow_models: Path, pictures: Callable[[Path], Picture]
) -> None:
    path = WORKFLOWS / "api" / "demo_text_to_image_ksampler.json"
    prompt = json.loads(path.read_text())
    ours = pictures(path)
    assert shows(Image.fromarray(ours), parse(caption_of(prompt)))
    (loader,) = (node for node in prompt.values() if node["class_type"] == "LoadParallelMMDiT")
    with lent(workflow_models / "diffusion_models" / "of_the_demo.safetensors", MMDIT.path.read_bytes()):
        loader |= {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "of_the_demo.safetensors", "weight_dtype": "default"},
        }
        stock = picture_of(editor, prompt)
    assert np.abs(stock.astype(int) - ours.astype(int)).mean() < 1


@contextmanager
def lent(path: Path, body: bytes) -> Iterator[None]:
    """The file in the user's models folder, for a while."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body)
    try:
        yield
    finally:
        path.unlink()


def listed(editor: ComfyServer, node: str, name: str) -> list[str]:
    """The demo's files among a loader's choices."""
    kind, settings = (*editor.get(f"/object_info/{node}")[node]["input"]["required"][name], {})[:2]
    choices = settings["options"] if kind == "COMBO" else kind
    return [choice for choice in choices if "parallel_demo" in choice]


def test_the_demos_files_are_listed_by_this_packs_nodes_alone(editor: ComfyServer, object_info: dict[str, Any]) -> None:
    assert listed(editor, "UNETLoader", "unet_name") == []
    assert listed(editor, "VAELoader", "vae_name") == []
    assert listed(editor, "LoadParallelMMDiT", "model_name") == ["parallel_demo/mmdit.safetensors"]
    assert listed(editor, "LoadParallelUNet", "model_name") == ["parallel_demo/unet.safetensors"]
    assert listed(editor, "ControlNetLoader", "control_net_name") == []
    assert listed(editor, "LoadParallelControlNet", "control_net_name") == ["parallel_demo/controlnet.safetensors"]
    assert listed(editor, "PatchParallelVAE", "vae_name") == ["parallel_demo/taesd3", "parallel_demo/taesdxl"]
    assert not any("parallel_demo" in str(node) for node in object_info.values() if is_core(node))


def is_core(node: dict[str, Any]) -> bool:
    return not str(node["python_module"]).startswith("custom_nodes")


def test_a_users_own_file_goes_before_the_demos(editor: ComfyServer, workflow_models: Path) -> None:
    own = workflow_models / "diffusion_models" / "parallel_demo" / "mmdit.safetensors"
    prompt = json.loads((WORKFLOWS / "api" / "demo_text_to_image.json").read_text())
    with lent(own, b"a file of the user's own, and no model"):
        assert listed(editor, "LoadParallelMMDiT", "model_name") == ["parallel_demo/mmdit.safetensors"]
        assert "should be a safetensors file" in editor.run(prompt).message
    assert editor.run(prompt).error is None


@pytest.mark.parametrize("name", ["text_to_image", "displaced"])
def test_the_demos_unet_draws_its_caption(name: str, pictures: Callable[[Path], Picture]) -> None:
    path = WORKFLOWS / "api" / f"demo_sdxl_{name}.json"
    assert shows(Image.fromarray(pictures(path)), parse(caption_of(json.loads(path.read_text()))))


def test_the_demos_second_picture_has_the_firsts_outlines_and_colours_of_its_own(editor: ComfyServer) -> None:
    prompt = json.loads((WORKFLOWS / "api" / "demo_sdxl_controlnet.json").read_text())
    outcome = editor.run(prompt)
    assert outcome.error is None, outcome.error
    first, second = (saved(editor, outcome, node_id) for node_id in ("15", "17"))
    captions = [parse(prompt[node_id]["inputs"]["caption"]) for node_id in ("3", "11")]
    assert shows(first, captions[0]) and shows(second, captions[1])
    outlines = [
        label_colors(picture) != list(COLORS).index(scene.background)
        for picture, scene in zip((first, second), captions, strict=True)
    ]
    assert np.mean(outlines[0] == outlines[1]) > 0.97


def test_a_controlnet_for_the_ranks_alone_is_refused_on_another_model(editor: ComfyServer) -> None:
    prompt = small(json.loads((WORKFLOWS / "api" / "sdxl_controlnet.json").read_text()))
    prompt["10"]["class_type"] = "LoadParallelControlNet"
    assert editor.run(prompt).error is None
    kind, inputs = LOCAL["sdxl_controlnet"]["3"]
    prompt["3"] |= {"class_type": kind, "inputs": inputs}
    said = editor.run(prompt).message
    assert (
        "comes from Load Parallel ControlNet" in said
        and "the MODEL is not parallel" in said
        and "Load ControlNet Model" in said
    )


def test_a_graph_from_before_demo_caption_had_a_model_is_the_graph_that_it_was(
    editor: ComfyServer, pictures: Callable[[Path], Picture]
) -> None:
    path = WORKFLOWS / "api" / "demo_text_to_image.json"
    prompt = json.loads(path.read_text())
    for node in prompt.values():
        if node["class_type"] == "DemoCaption":
            del node["inputs"]["model"]
    assert (picture_of(editor, prompt) == pictures(path)).all()


def test_another_size_than_the_demos_is_told_so_where_it_fails(editor: ComfyServer) -> None:
    prompt = json.loads((WORKFLOWS / "api" / "demo_text_to_image_ksampler.json").read_text())
    (sampler,) = (node for node in prompt.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["latent_image"] = ["size", 0]
    size = {"width": 1024, "height": 1024, "batch_size": 1}
    prompt["size"] = {"class_type": "EmptySD3LatentImage", "inputs": size}
    editor.post("/free", {"unload_models": True, "free_memory": True})  # so that the loader runs and speaks
    outcome = editor.run(prompt)
    assert "sides of at most 512 pixels" in outcome.message and "about 128 x 128 pixels" in outcome.message
    (loader,) = (node_id for node_id, node in prompt.items() if node["class_type"] == "LoadParallelMMDiT")
    assert "about 128 x 128 pixels" in "\n".join(outcome.texts[loader])


def caption_of(prompt: dict[str, Any]) -> str:
    (caption,) = (node["inputs"]["caption"] for node in prompt.values() if node["inputs"].get("caption"))
    return caption


def test_the_editors_command_sends_the_workflow_and_gets_it_back_parallel(editor: ComfyServer) -> None:
    assert "/parallel_mmdit/workflow" in editor.get_text("/extensions/parallel-mmdit/make_parallel.js")
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}},
        "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "positive": ["3", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a fox"}},
    }
    answer = editor.post("/parallel_mmdit/workflow", {"workflow": prompt})
    assert answer["workflow"]["2"]["inputs"]["model"] == ["4", 0] and answer["report"]["runs"]
    assert [remark["key"] for remark in answer["report"]["changed"]] == ["1"]
    assert editor.post("/parallel_mmdit/workflow", {"workflow": []})["error"]["code"] == "input"
