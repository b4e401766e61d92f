"""ControlNet files in the types and layouts that users have give one latent on a local MODEL and on its parallel twin."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import run_twins
from quantised_files import bare_fp8, comfy_quant, scaled_fp8, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import Backend
from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.mmdit import small_config
from parallel_backend.small_checkpoints.mmdit_control import DOUBLE, INSTANTX, STABILITY, control_tensors
from parallel_backend.small_checkpoints.unet import CONFIGS
from parallel_backend.small_checkpoints.unet_control import control_config, control_lora_tensors, unet_control_tensors

Outcomes = dict[str, dict[str, Any]]
Tensors = dict[str, Tensor]
UNET = CONFIGS["two layers"]
UNION = CONFIGS["for unions"]
TYPES = {
    "fp8": bare_fp8,
    "fp8 e5m2": partial(bare_fp8, dtype=torch.float8_e5m2),
    "fp16": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "bf16": lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
}
# Core opens these without their scales.
SCALED = {
    "scaled fp8": scaled_fp8,
    "scaled comfy_quant": partial(comfy_quant, layout="TensorCoreFP8Layout", form="float8_e4m3fn"),
}
UNLIKE = "as ComfyUI opens it"
FEW = {name: (TYPES | SCALED)[name] for name in ("fp8", "fp16", "scaled fp8")}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"control_model.{name}": tensor for name, tensor in tensors.items()}


def written() -> dict[str, Tensors]:
    """By folder and name."""
    sdxl, union = control_config(UNET), control_config(UNION, control_types=6)
    single, diffusers = unet_control_tensors(sdxl, "single file"), unet_control_tensors(sdxl, "diffusers")
    files = {f"sdxl/{kind}": make(single) for kind, make in (TYPES | SCALED).items()}
    files |= {
        "sdxl/fp8, diffusers": bare_fp8(diffusers),
        "sdxl/fp16, diffusers": TYPES["fp16"](diffusers),
        "sdxl/fp8, control_model": bare_fp8(prefixed(single)),
        "sdxl/scaled fp8, diffusers": scaled_fp8(diffusers),
        "sdxl/fp8 Control-LoRA": bare_fp8(control_lora_tensors(sdxl)),
    }
    several = unet_control_tensors(union, "diffusers")
    files |= {f"union/{kind}": make(several) for kind, make in FEW.items()}
    for name, family, kinds in (
        ("sd3", "sd3-medium", (INSTANTX,)),
        ("sd3.5-large", "sd3.5-large", (INSTANTX, STABILITY, DOUBLE)),
    ):
        for kind in kinds:
            tensors = control_tensors(kind, small_config(family))
            files |= {f"{name}/{form}, {kind}": make(tensors) for form, make in FEW.items()}
    return files


def sd1() -> Tensors:
    """As core knows one."""
    config = control_config(replace(UNION, context_width=768))
    found = {name: t for name, t in unet_control_tensors(config, "single file").items() if "label_emb" not in name}
    convolved = ("proj_in.weight", "proj_out.weight")
    return {name: t[:, :, None, None] if name.endswith(convolved) else t for name, t in found.items()}


def others() -> dict[str, Tensors]:
    """What is no ControlNet of these models, what core reads no ControlNet from, and those made with a model's weights."""
    sdxl = control_config(UNET)
    single = unet_control_tensors(sdxl, "single file")
    return {
        "other/sd1": sd1(),
        "other/flux": {"controlnet_x_embedder.weight": torch.zeros(1), "controlnet_blocks.0.weight": torch.zeros(1)},
        "other/nvfp4": comfy_quant(single, layout="TensorCoreNVFP4Layout", form="nvfp4"),
        "of weights/difference": prefixed(single) | {"difference": torch.tensor([])},
        "of weights/lora": control_lora_tensors(sdxl),
    }


@pytest.fixture(scope="module")
def files(control_files: Path) -> Path:
    folder = control_files
    for name, tensors in (written() | others()).items():
        path = folder / f"{name}.safetensors"
        (path.parent / "values").mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        if path.name.startswith("scaled"):
            save_values(path)
    unet = load_file(folder / "unet-layers.safetensors")
    for form, make in (("fp8", bare_fp8), ("scaled", scaled_fp8)):
        save_file({n: t.contiguous() for n, t in make(unet).items()}, folder / f"unet-layers-{form}.safetensors")
    save_values(folder / "unet-layers-scaled.safetensors")
    write_gguf(
        folder / "other" / "gguf.gguf", unet_control_tensors(control_config(UNET), "single file"), "Q8_0", "sdxl"
    )
    for name in ("gguf.gguf", "nvfp4.safetensors"):
        save_values(folder / "other" / name, f"{name}.safetensors")
    return folder


def save_values(path: Path, name: str = "") -> None:
    """Of a file's tensors, in the folder for that, under its own name or that."""
    (path.parent / "values").mkdir(exist_ok=True)
    tensors = {n: t.float().contiguous() for n, t in WholeFile(path).items()}
    save_file(tensors, path.parent / "values" / (name or path.name))


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, files: Path, backend2: Backend) -> Outcomes:
    found = run_twins(comfy, backend2, files, "control_file_cases", seconds=500, TWINS_WORLD="2")
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    alike = {name: outcome for name, outcome in outcomes.items() if UNLIKE not in name}
    wrong = {name: o.get("error", o.get("far")) for name, o in alike.items() if not o.get("far", 1) <= 1e-4}
    assert sum("refused" in name for name in alike) > 10 and not wrong, wrong


def test_each_changes_the_latent(outcomes: Outcomes) -> None:
    assert not {name for name, outcome in outcomes.items() if outcome["effect"] < 1e-2}


def test_comfyui_leaves_scales_out_which_is_why_it_may_not_compute_such_a_file(outcomes: Outcomes) -> None:
    apart = [outcome["far"] for name, outcome in outcomes.items() if UNLIKE in name]
    assert len(apart) == 2 and min(apart) > 0.1, apart


def test_the_ranks_compute_the_files_that_they_know_in_one_request(outcomes: Outcomes) -> None:
    files = {f"{name.replace('/', ', ')}": outcomes[name.replace("/", ", ")]["said"] for name in written()}
    files |= {name: outcome["said"] for name, outcome in outcomes.items() if "our loader" in name}
    assert all("the whole loop in the backend" in said for said in files.values()), files


def test_what_is_made_with_the_models_patched_or_quantised_weights_is_comfyuis_to_compute(outcomes: Outcomes) -> None:
    reasons = {
        "sdxl, DiffControlNet": "difference.safetensors is a DiffControlNet",
        "sdxl, DiffControlNet with a LoRA": "difference.safetensors is a DiffControlNet",
        "sdxl, Control-LoRA with a LoRA": "ComfyUI computes lora.safetensors: it is made of the MODEL's weights, on which patches lie",
        "sdxl in fp8, Control-LoRA": "lora.safetensors is a Control-LoRA, which is added to weights",
        "sdxl in scaled fp8, Control-LoRA": "lora.safetensors is a Control-LoRA, which is added to weights",
    }
    others = {name: outcomes[name]["said"] for name, words in reasons.items() if words not in outcomes[name]["said"]}
    assert not others
    assert "the whole loop in the backend" in outcomes["sdxl, Control-LoRA"]["said"]


def test_a_file_that_goes_after_it_was_loaded_is_computed_by_comfyui(outcomes: Outcomes) -> None:
    said = outcomes["sdxl, a file that goes"]["said"]
    assert "ComfyUI computes going.safetensors" in said and "There is no file" in said, said
