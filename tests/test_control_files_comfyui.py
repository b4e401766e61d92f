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
from quantised_files import bare_fp8, comfy_quant, scaled_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import Backend
from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.mmdit import small_config
from parallel_backend.small_checkpoints.mmdit_control import DOUBLE, INSTANTX, STABILITY, control_tensors
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet
from parallel_backend.small_checkpoints.unet_control import control_config, control_lora_tensors, unet_control_tensors

Outcomes = dict[str, dict[str, Any]]
Tensors = dict[str, Tensor]
UNET = CONFIGS["two layers"]
# Core knows unions of this width alone.
UNION = replace(CONFIGS["tiny"], block_channels=(320,), down_depths=((1,),), up_depths=((1, 1),))
FP8 = bare_fp8
TYPES = {
    "fp8": FP8,
    "fp8 e5m2": partial(bare_fp8, dtype=torch.float8_e5m2),
    "fp16": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "bf16": lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
}
# Core opens these without their scales.
SCALED = {
    "scaled fp8": scaled_fp8,
    "scaled comfy_quant": partial(comfy_quant, layout="TensorCoreFP8Layout", form="float8_e4m3fn"),
}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"control_model.{name}": tensor for name, tensor in tensors.items()}


def written() -> dict[str, Tensors]:
    """By folder and name."""
    sdxl, union = control_config(UNET), control_config(UNION, control_types=6)
    single, diffusers = unet_control_tensors(sdxl, "single file"), unet_control_tensors(sdxl, "diffusers")
    files = {f"sdxl/{kind}": make(single) for kind, make in (TYPES | SCALED).items()}
    files |= {
        "sdxl/fp8, diffusers": FP8(diffusers),
        "sdxl/fp16, diffusers": TYPES["fp16"](diffusers),
        "sdxl/fp8, control_model": FP8(prefixed(single)),
        "sdxl/scaled fp8, diffusers": scaled_fp8(diffusers),
        "sdxl/fp8 Control-LoRA": FP8(control_lora_tensors(sdxl)),
    }
    several = unet_control_tensors(union, "diffusers")
    files |= {f"union/{kind}": make(several) for kind, make in (TYPES | SCALED).items()}
    for name, family, kinds in (
        ("sd3", "sd3-medium", (INSTANTX,)),
        ("sd3.5-large", "sd3.5-large", (INSTANTX, STABILITY, DOUBLE)),
    ):
        for kind in kinds:
            tensors = control_tensors(kind, small_config(family))
            forms = TYPES | SCALED if kind != DOUBLE else {"fp8": FP8}
            files |= {f"{name}/{form}, {kind}": make(tensors) for form, make in forms.items()}
    return files


@pytest.fixture(scope="module")
def files(models: Path) -> Path:
    folder = models / "diffusion_models"
    write_unet(folder / "unet-layers.safetensors", UNET, "single file")
    write_unet(folder / "unet-320.safetensors", UNION, "single file")
    for name, tensors in written().items():
        path = folder / f"{name}.safetensors"
        (path.parent / "values").mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        if path.name.startswith("scaled"):
            save_values(path)
    unet = load_file(folder / "unet-layers.safetensors")
    for form, make in (("fp8", FP8), ("scaled", scaled_fp8)):
        save_file({n: t.contiguous() for n, t in make(unet).items()}, folder / f"unet-layers-{form}.safetensors")
    save_values(folder / "unet-layers-scaled.safetensors")
    return folder


def save_values(path: Path) -> None:
    """Of a file's tensors, in the folder for that."""
    (path.parent / "values").mkdir(exist_ok=True)
    save_file({n: t.float().contiguous() for n, t in WholeFile(path).items()}, path.parent / "values" / path.name)


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, files: Path, backend2: Backend) -> Outcomes:
    found = run_twins(comfy, backend2, files, "control_file_cases", seconds=400, TWINS_WORLD="2")
    return {f"{model}, {case}": outcome for model, cases in found.items() for case, outcome in cases.items()}


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    wrong = {name: o.get("error", o.get("far")) for name, o in outcomes.items() if not o.get("far", 1) <= 1e-4}
    assert not wrong, wrong


def test_dump(outcomes: Outcomes) -> None:
    import json
    open("/tmp/overlay-c/out.json", "w").write(json.dumps(outcomes, indent=1))
