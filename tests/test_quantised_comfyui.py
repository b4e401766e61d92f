"""Quantised files in a real ComfyUI: a local MODEL and its parallel twin draw one latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comfyui.installation import ComfyInstallation
from comfyui.twin_run import Outcomes, run_twins
from quantised_files import GGUF, SAFETENSORS, scaled_fp8, write_gguf, write_quantised
from safetensors.torch import load_file, save_file

from parallel_backend import Backend
from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

# ComfyUI's products of int8 weights round what comes in to 8 bits too: a difference in the last bit grows to that size.
ROUNDED = 0.03
# The same of products in fp8, which has 3 bits after the first; they change these latents by 0.1 and more.
IN_FP8 = 0.06
# What ComfyUI's own rounding of a patched fp8 weight to fp8 does to these latents, at most.
REQUANTISED = 0.06
# ComfyUI-GGUF knows no function for it on a device and asks the gguf package at each product, which takes its time.
AS_COMFYUI = "LoRA as ComfyUI lays it"
SLOW = {"TQ1_0"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, unets: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    dense = load_file(write_mmdit(tmp_path_factory.mktemp("dense") / "m.safetensors", small_config("sd3.5-medium", 4)))
    unet = load_file(unets / "unet-tiny.safetensors")
    for name, tensors in (("half", dense), ("unet_half", unet)):
        save_file({n: t.half().contiguous() for n, t in tensors.items()}, folder / f"{name}.safetensors")
    save_file(scaled_fp8(unet), folder / "unet_scaled_fp8.safetensors")
    written = [
        write_quantised(folder, dense, form) for form in [*SAFETENSORS, "nf4, double", *GGUF] if form not in SLOW
    ]
    written += [folder / "unet_scaled_fp8.safetensors", write_gguf(folder / "unet_Q8_0.gguf", unet, "Q8_0", "sdxl")]
    (folder / "values").mkdir()
    for file in written:
        values = {name: tensor.float().contiguous() for name, tensor in WholeFile(file).items()}
        save_file(values, folder / "values" / f"{file.stem}.safetensors")
    return folder


@pytest.fixture(scope="module")
def outcomes(comfy: ComfyInstallation, files: Path, backend2: Backend) -> Outcomes:
    return run_twins(comfy, backend2, files, "quantised_cases", seconds=500, QUANTISED_FILES=str(files))


def named(outcomes: Outcomes, *cases: str) -> dict[str, dict[str, Any]]:
    found = {(file, case): outcome for file, by_case in outcomes.items() for case, outcome in by_case.items()}
    return {f"{file}, {case}": outcome for (file, case), outcome in found.items() if case in cases}


def most(name: str) -> float:
    if name.startswith("products") and "wants none" not in name:
        return IN_FP8
    return ROUNDED if name.startswith(("int8", "mixed")) else 1e-4


def test_a_layer_in_fp8_gives_what_comfyuis_gives(outcomes: Outcomes) -> None:
    layers = named(outcomes, "one layer")
    assert len(layers) == 2 and all(outcome.get("far", 1) < 1e-6 for outcome in layers.values()), layers


def test_each_gives_one_latent_on_both(outcomes: Outcomes) -> None:
    wrong = {
        name: outcome.get("error", outcome.get("far"))
        for name, outcome in named(outcomes, "plain", "LoRA").items()
        if not outcome.get("far", 1) <= most(name)
    }
    assert len(outcomes) > len(SAFETENSORS) and not wrong, wrong


def test_a_lora_is_closer_to_the_values_than_where_the_weight_is_quantised_again(outcomes: Outcomes) -> None:
    apart = {name: (o["far"], o["effect"]) for name, o in named(outcomes, AS_COMFYUI).items()}
    scaled = {name: pair for name, pair in apart.items() if "fp8" in name}
    assert scaled and all(far < REQUANTISED < effect for far, effect in scaled.values()), scaled
