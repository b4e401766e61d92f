"""Prompts as diffusers' own pipelines encode them, from folders, single files and full checkpoints; and files that don't do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_pipelines import as_in_a_file, as_open_clip, sd3_pipeline, sdxl_pipeline, single_file
from torch import Tensor

from parallel_backend.checkpoint_files.hub import local_path
from parallel_backend.errors import BackendError, CheckpointError, UnsupportedError
from parallel_backend.text_encoders import tokenizers
from parallel_backend.text_encoders.encoders import CheckpointEncoders, Family
from parallel_backend.text_encoders.files import find, find_inside

PROMPTS = ["a red circle left of a blue square", "zebra!", "a" * 400]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd3")
    return sd3_pipeline(folder), folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sdxl")
    return sdxl_pipeline(folder), folder


@pytest.fixture(scope="module")
def singles(sd3: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD3's encoders as files whose names tell nothing, with the tokenizers' folders beside them."""
    pipeline, folder = sd3
    files = tmp_path_factory.mktemp("singles")
    for name, model in (("x", pipeline.text_encoder), ("y", pipeline.text_encoder_2), ("z", pipeline.text_encoder_3)):
        single_file(files / f"{name}.safetensors", model)
    for number in ("", "_2", "_3"):
        shutil.copytree(folder / f"tokenizer{number}", files / f"tokenizer{number}")
    return files


def encoders(paths: list[Path], family: Family = "SD3", **settings: Any) -> CheckpointEncoders:
    return CheckpointEncoders(family, find(paths), 4096, **settings)


def of_sd3(pipeline: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    context, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return context, pooled


def check(made: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], bound: float = 1e-5) -> None:
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.device.type == "cpu"
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@torch.no_grad()
def test_sd3_from_its_folder_and_from_single_files(sd3: tuple[Any, Path], singles: Path) -> None:
    pipeline, folder = sd3
    wanted = of_sd3(pipeline, PROMPTS)
    assert not torch.allclose(wanted[0][0], wanted[0][1], atol=1e-2)
    check(encoders([folder], tokenizers=[folder]).encode(PROMPTS, CPU, torch.float32), wanted)
    files = [singles / f"{name}.safetensors" for name in "zxy"]
    check(encoders(files).encode(PROMPTS, CPU, torch.float32), wanted)
    by_folder = [folder / f"text_encoder{number}" for number in ("_3", "", "_2")]
    check(encoders(by_folder).encode(PROMPTS, CPU, torch.float32), wanted)


@torch.no_grad()
def test_sd3_without_t5(sd3: tuple[Any, Path], singles: Path, tmp_path: Path) -> None:
    without = sd3_pipeline(tmp_path, with_t5=False)
    made = encoders([singles / "x.safetensors", singles / "y.safetensors"]).encode(PROMPTS, CPU, torch.float32)
    check(made, of_sd3(without, PROMPTS))


@torch.no_grad()
def test_sdxl_with_no_negative_prompt_and_an_empty_one(sdxl: tuple[Any, Path]) -> None:
    pipeline, folder = sdxl
    made = encoders([folder], "SDXL", zeros_for_none=True, tokenizers=[folder])
    for negative in (None, "", "blue"):
        context, no_context, pooled, no_pooled = pipeline.encode_prompt(PROMPTS[0], negative_prompt=negative)
        wanted = torch.cat([context, no_context]), torch.cat([pooled, no_pooled])
        check(made.encode([PROMPTS[0], negative], CPU, torch.float32), wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", ["SD3", "SDXL"])
def test_encoders_inside_a_full_checkpoint(
    family: Family, sd3: tuple[Any, Path], sdxl: tuple[Any, Path], tmp_path: Path
) -> None:
    pipeline, folder = sd3 if family == "SD3" else sdxl
    first, second = as_in_a_file(pipeline.text_encoder), as_in_a_file(pipeline.text_encoder_2)
    parts = {"conditioner.embedders.0.transformer.": first, "conditioner.embedders.1.model.": as_open_clip(second)}
    if family == "SD3":
        third = as_in_a_file(pipeline.text_encoder_3)
        parts = {
            f"text_encoders.{n}.transformer.": t for n, t in (("clip_l", first), ("clip_g", second), ("t5xxl", third))
        }
    whole = {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    path = tmp_path / "whole.safetensors"
    save_file(whole | {"model.diffusion_model.joint_blocks.0.x": torch.zeros(1)}, path)
    made = CheckpointEncoders(family, find_inside(path), 4096, tokenizers=[folder])
    wanted = of_sd3(pipeline, PROMPTS) if family == "SD3" else pipeline.encode_prompt(PROMPTS)[::2]
    check(made.encode(PROMPTS, CPU, torch.float32), wanted)


@torch.no_grad()
@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
def test_half_and_fp8_files_are_computed_with_in_another_dtype(
    stored: torch.dtype, sd3: tuple[Any, Path], singles: Path, tmp_path: Path
) -> None:
    pipeline, folder = sd3
    small = single_file(tmp_path / "t5.safetensors", pipeline.text_encoder_3, stored)
    files = [singles / "x.safetensors", singles / "y.safetensors", small]
    context, _ = encoders(files, tokenizers=[folder]).encode(PROMPTS, CPU, torch.float32)
    wanted, _ = of_sd3(pipeline, PROMPTS)
    rounding = (context - wanted).abs().max() / wanted.abs().max()
    assert context.dtype == torch.float32 and 1e-6 < rounding < (0.3 if stored.itemsize == 1 else 0.01)
    assert encoders(files, tokenizers=[folder]).encode(["a"], CPU, torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_text_that_is_cut_off_is_told(singles: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [singles / "x.safetensors", singles / "y.safetensors"]
    encoders(files).encode(["a" * 400], CPU, torch.float32)
    assert any("CLIP-L reads 77 of the" in record.getMessage() for record in caplog.records)


def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "text_model.final_layer_norm.bias"}


def grown(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"text_model.encoder.layers.0.extra.weight": torch.zeros(2)}


def narrow(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"text_model.final_layer_norm.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [(cut, "1 missing tensors, such as .*final_layer_norm.bias"), (grown, "1 unexpected tensors"), (narrow, "size")],
)
def test_a_file_that_is_not_whole_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str, singles: Path, tmp_path: Path
) -> None:
    save_file(change(load_file(singles / "x.safetensors")), tmp_path / "clip.safetensors")
    made = encoders([tmp_path / "clip.safetensors", singles / "y.safetensors"], tokenizers=[singles])
    with pytest.raises(CheckpointError, match=f"clip.safetensors is not a whole CLIP-L: .*{words}"):
        made.encode(["a"], CPU, torch.float32)


def test_files_that_do_not_belong_together_are_refused(singles: Path, tmp_path: Path) -> None:
    x, y, z = (singles / f"{name}.safetensors" for name in "xyz")
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    cases: list[tuple[list[Path], Family, type[BackendError], str]] = [
        ([x], "SD3", CheckpointError, r"SD3 needs the text encoder CLIP bigG; found: CLIP-L \(x.safetensors\)"),
        ([z], "SDXL", CheckpointError, "SDXL needs the text encoder CLIP-L and CLIP bigG"),
        ([x, y, z], "SDXL", UnsupportedError, "SDXL takes no T5"),
        ([x, x], "SD3", CheckpointError, "are both CLIP-L"),
        ([tmp_path / "other.safetensors"], "SD3", CheckpointError, "other.safetensors holds no text encoder"),
        ([tmp_path / "none.safetensors"], "SD3", CheckpointError, "There is no file"),
        ([tmp_path], "SD3", CheckpointError, "holds no text encoder"),
    ]
    for paths, family, error, words in cases:
        with pytest.raises(error, match=words):
            encoders(paths, family)


def test_a_missing_tokenizer_names_the_ways_to_have_one(
    singles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(tokenizers, "PACK", tmp_path / "custom_nodes" / "pack")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in "xy":
        os.link(singles / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    files = [tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    with pytest.raises(CheckpointError, match=r"tokenizers=FOLDER.*COMFYUI_PATH.*hf download openai/clip-vit-large"):
        encoders(files).encode(["a"], CPU, torch.float32)
    # A ComfyUI has one for both.
    shutil.copytree(singles / "tokenizer", tmp_path / "comfyui" / "comfy" / "sd1_tokenizer")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "comfyui"))
    made = encoders(files).encode(PROMPTS, CPU, torch.float32)
    check(made, encoders([singles / "x.safetensors", singles / "y.safetensors"]).encode(PROMPTS, CPU, torch.float32))


def test_a_tokenizer_that_cannot_be_read_is_named(singles: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    files = [singles / "x.safetensors", singles / "y.safetensors"]
    with pytest.raises(CheckpointError, match=f"The tokenizer in {tmp_path / 'tokenizer'} can't be read"):
        encoders(files, tokenizers=[tmp_path]).encode(["a"], CPU, torch.float32)


def test_a_name_of_the_hub_is_looked_up_in_its_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "stabilityai/stable-diffusion-3.5-medium"
    with pytest.raises(
        CheckpointError, match=f"nor a model {name} in the .* cache. .*hf download {name} --include '..json' --include"
    ):
        local_path(Path(name))
    for path in ("../sd3.5_medium", "models/no.ckpt", "checkpoints/no.SFT"):  # of no model on a hub
        assert local_path(Path(path)) == Path(path)
    kept = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    assert local_path(Path(name)) == kept / "snapshots" / "abc"
    assert local_path(tmp_path) == tmp_path
    assert local_path(Path("folder/model.safetensors")) == Path("folder/model.safetensors")


def test_without_transformers_the_error_says_what_to_install() -> None:
    code = """if True:
        import sys; sys.modules["transformers"] = None
        from parallel_backend.text_encoders.loading import import_transformers
        import_transformers()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "ConfigError" in done.stderr and "pip install 'parallel-mmdit[text]'" in done.stderr


def test_the_client_starts_without_transformers() -> None:
    code = "import sys, parallel_backend; print('transformers' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["False", "False"], done.stderr
