"""Files as trainers, hubs and old machines leave them: pickles, prefixes, keys of others, folders, links. Each holds its model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui.core_run import run_script
from comfyui.installation import HERE, ComfyInstallation
from quantised_files import bitsandbytes
from reference_models import diffusers_mmdit
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import Backend, MeshSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.checkpoint_files.layout import files_of
from parallel_backend.errors import CheckpointError, UnsupportedError
from parallel_backend.models.families import OpenedModel, open_model
from parallel_backend.quantized.weight import QuantizedWeight
from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.mmdit import mmdit_tensors, small_config, write_mmdit
from parallel_backend.small_checkpoints.unet import CONFIGS, unet_tensors

LDM = "model.diffusion_model."
MMDIT = mmdit_tensors(small_config("sd3.5-medium", 2))
UNET = unet_tensors(CONFIGS["tiny"], "single file")
# What stands in checkpoints beside a diffusion model.
OTHERS = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modeltime_embed0weight": torch.zeros(4, 4),
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(4),
    "optimizer.state.0": torch.zeros(2),
}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def trainers(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """As pytorch-lightning saves a run."""
    return {"epoch": 3, "state_dict": tensors, "optimizer_states": [{"state": {0: torch.zeros(3)}}], "callbacks": {}}


def as_diffusers(path: Path) -> None:
    """diffusers' own file of the MMDiT, and a tensor that its model doesn't have."""
    tensors = diffusers_mmdit(small_config("sd3.5-medium", 2), MMDIT).state_dict()
    save_file({**{name: t.contiguous() for name, t in tensors.items()}, "extra": torch.zeros(2)}, path)


# By file name: what is written there, and what it is a model of.
FILES: dict[str, tuple[Callable[[Path], object], dict[str, Tensor]]] = {
    "trainers.ckpt": (lambda path: torch.save(trainers(below(LDM, MMDIT) | OTHERS), path), MMDIT),
    "plain.pt": (lambda path: torch.save(MMDIT, path), MMDIT),
    "old.pth": (lambda path: torch.save(MMDIT, path, _use_new_zipfile_serialization=False), MMDIT),
    "one_table.bin": (lambda path: torch.save({"model": MMDIT}, path), MMDIT),
    "net.safetensors": (lambda path: save_file(below("net.", MMDIT) | OTHERS, path), MMDIT),
    "model.model.safetensors": (lambda path: save_file(below("model.model.", MMDIT) | OTHERS, path), MMDIT),
    "model.safetensors": (lambda path: save_file(below("model.", MMDIT) | OTHERS, path), MMDIT),
    "extra.safetensors": (lambda path: save_file(MMDIT | {"modelspec.extra": torch.zeros(3)}, path), MMDIT),
    "diffusers.safetensors": (as_diffusers, MMDIT),
    "unet.ckpt": (lambda path: torch.save(trainers(below(LDM, UNET) | OTHERS), path), UNET),
    "unet.safetensors": (lambda path: save_file(UNET | OTHERS | {"scalar": torch.tensor(1.0)}, path), UNET),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layouts")
    for name, (write, _) in FILES.items():
        write(made / name)
    return made


def tensor_of(opened: OpenedModel, name: str, rows: int) -> Tensor:
    held, row = opened.place(name)
    tensor = opened.source.read(held)
    return tensor if held == name else tensor[row : row + rows]


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_its_model_whatever_it_is_called_and_has_beside_it(name: str, folder: Path) -> None:
    opened = open_model(folder / name)
    for key, tensor in FILES[name][1].items():
        assert torch.equal(tensor_of(opened, key, len(tensor)), tensor), key


def test_comfyui_loads_the_same_of_each(folder: Path, comfy: ComfyInstallation, tmp_path: Path) -> None:
    run_script(comfy, "core_weights.py", HERE.parents[1], folder, tmp_path / "core", *FILES, seconds=120)
    cores = load_file(tmp_path / "core")
    for name in FILES:
        opened = open_model(folder / name)
        own = {key.removeprefix(f"{name}/"): t for key, t in cores.items() if key.startswith(f"{name}/")}
        assert len(own) == len(FILES[name][1])
        assert all(torch.equal(tensor_of(opened, key, len(tensor)), tensor) for key, tensor in own.items())


@pytest.mark.parametrize("name", ["extra.safetensors", "diffusers.safetensors", "unet.safetensors", "trainers.ckpt"])
def test_ranks_draw_and_tell_what_they_left_out(name: str, folder: Path, backend2: Backend) -> None:
    mesh = MeshSpec(patch=2) if "unet" in name else MeshSpec(ulysses=2)
    notes = backend2.load_model(folder / name, mesh, "float32").loaded.notes
    left_out = {
        "extra.safetensors": ["1 tensors that the model doesn't have: modelspec.extra."],
        "diffusers.safetensors": ["1 tensors that the model doesn't have: extra."],
        "unet.safetensors": ["5 tensors that the model doesn't have: cond_stage_model"],
        "trainers.ckpt": [],
    }[name]
    assert len(notes) == len(left_out)
    assert all(words in note and name in note for words, note in zip(left_out, notes, strict=True))


# -- pickles ----------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo this must not run",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".PTH"])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_not_run(
    suffix: str, zipped: bool, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / f"evil{suffix}"
    torch.save(trainers(MMDIT) | {"hook": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"evil{suffix} is a pickle of more than tensors.*system"):
        open_model(path)
    assert "this must not run" not in capfd.readouterr().out


def test_numbers_of_numpy_beside_the_tensors_do_no_harm(tmp_path: Path) -> None:
    scores = {"best": np.float64(0.5), "last": np.float32(0.25), "step": np.int64(7)}
    torch.save(trainers(MMDIT) | {"scores": scores}, tmp_path / "scored.ckpt")
    assert open_model(tmp_path / "scored.ckpt").config == small_config("sd3.5-medium", 2)


def test_a_pickle_in_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    name = "x_embedder.proj.weight"
    torch.save(MMDIT | {name: MMDIT[name].double()}, tmp_path / "double.pt")
    with pytest.raises(UnsupportedError, match=r"double.pt stores x_embedder.proj.weight as float64"):
        open_model(tmp_path / "double.pt").source.read(name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(50), b"\x80\x02garbage", bytes(100)])
def test_a_damaged_pickle_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "damaged.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.ckpt can't be read"):
        open_model(tmp_path / "damaged.ckpt")


def test_a_pickle_of_no_tensors_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "steps.ckpt")
    with pytest.raises(CheckpointError, match=r"steps.ckpt holds no table of tensors"):
        open_model(tmp_path / "steps.ckpt")


# -- folders ----------------------------------------------------------------------------------------------------


def sharded(folder: Path, tensors: dict[str, Tensor], stem: str = "diffusion_pytorch_model") -> Path:
    """In three files, with the index that diffusers writes."""
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("part", ["transformer", "unet"])
def test_a_pipelines_model_is_read_by_its_index_whole_and_once(part: str, tmp_path: Path) -> None:
    config = small_config("sd3.5-medium", 2)
    layout = (
        diffusers_mmdit(config, MMDIT).state_dict()
        if part == "transformer"
        else unet_tensors(CONFIGS["tiny"], "diffusers")
    )
    folder = sharded(tmp_path / "pipeline" / part, {name: t.contiguous() for name, t in layout.items()})
    save_file({"another": torch.zeros(1)}, folder / "model.fp16.safetensors")  # named by no index
    opened = open_model(tmp_path / "pipeline")
    for key, tensor in (MMDIT if part == "transformer" else UNET).items():
        assert torch.equal(tensor_of(opened, key, len(tensor)), tensor), key
    assert files_of(folder / "diffusion_pytorch_model-00002-of-00003.safetensors") == files_of(tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("part", "joined"),
    [("transformer", "joint_blocks.0.x_block.attn.qkv.weight"), ("unet", "attn1.to_qkv.weight")],
)
def test_a_folder_that_bitsandbytes_has_quantised_is_that_of_its_values(part: str, joined: str, tmp_path: Path) -> None:
    tensors = unet_tensors(CONFIGS["tiny"])
    if part == "transformer":
        tensors = diffusers_mmdit(small_config("sd3.5-medium", 2), MMDIT).state_dict()
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    quantised = bitsandbytes(dense, nested=True, quantises=lambda _, tensor: tensor.ndim == 2)  # as diffusers does
    sharded(tmp_path / "nf4" / part, quantised)
    values = WholeFile(tmp_path / "nf4" / part)
    sharded(tmp_path / "values" / part, {name: tensor.contiguous() for name, tensor in values.items()})
    assert_holds_its_values(open_model(tmp_path / "nf4"), open_model(tmp_path / "values"), joined)


@pytest.mark.parametrize(
    ("tensors", "joined"),
    [(MMDIT, "joint_blocks.0.x_block.attn.qkv.weight"), (UNET, "attn1.to_qkv.weight")],
    ids=["mmdit", "unet"],
)
def test_a_whole_checkpoint_that_bitsandbytes_has_quantised_is_that_of_its_values(
    tensors: dict[str, Tensor], joined: str, tmp_path: Path
) -> None:
    nf4, values = tmp_path / "nf4.safetensors", tmp_path / "values.safetensors"
    save_file(below(LDM, bitsandbytes(tensors)) | OTHERS, nf4)
    save_file({name: tensor.contiguous() for name, tensor in WholeFile(nf4, LDM).items()}, values)
    assert_holds_its_values(open_model(nf4), open_model(values), joined)


def assert_holds_its_values(opened: OpenedModel, expected: OpenedModel, joined: str) -> None:
    for name in expected.source.names():
        assert torch.equal(opened.source.read(name) + 0.0, expected.source.read(name)), name
    name = next(name for name in opened.source.names() if name.endswith(joined))
    assert isinstance(opened.source.read(name), QuantizedWeight)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "transformer", MMDIT)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    for path in (folder, folder / "diffusion_pytorch_model-00001-of-00003.safetensors"):
        with pytest.raises(CheckpointError, match=r"lacks diffusion_pytorch_model-00002-of-00003.safetensors"):
            content_key(path)


def test_an_index_of_files_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "transformer", MMDIT)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names ../outside.safetensors, not files beside it"):
        content_key(folder)


def test_of_several_variants_the_plain_one_is_read_or_none(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors", "model.non_ema.safetensors"):
        write_mmdit(tmp_path / name, small_config("sd3.5-medium", 2), seed=len(name))
    assert files_of(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"several models: model.fp16.safetensors, model.non_ema.safetensors"):
        files_of(tmp_path)
    (tmp_path / "model.non_ema.safetensors").unlink()
    assert files_of(tmp_path) == [tmp_path / "model.fp16.safetensors"]


# -- links and kinds --------------------------------------------------------------------------------------------


def test_a_link_into_a_hubs_cache_counts_by_its_own_name(folder: Path, tmp_path: Path, backend2: Backend) -> None:
    blob = tmp_path / "blobs" / "0123456789abcdef"
    blob.parent.mkdir()
    for name in ("plain.pt", "extra.safetensors"):
        blob.unlink(missing_ok=True)
        blob.write_bytes((folder / name).read_bytes())
        link = tmp_path / name
        link.symlink_to(blob)
        model = backend2.load_model(link, MeshSpec(ulysses=2), "float32")
        assert model.file == name and not any(blob.name in note for note in model.loaded.notes)
        link.unlink()


@pytest.mark.parametrize("name", ["time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"])
def test_a_whole_lcm_unet_is_refused_with_what_to_use(name: str, tmp_path: Path) -> None:
    layout = "diffusers" if "embedding" in name else "single file"
    tensors = unet_tensors(CONFIGS["tiny"], layout)  # type: ignore[arg-type]
    save_file({**tensors, name: torch.zeros(64, 256)}, tmp_path / "lcm.safetensors")
    with pytest.raises(UnsupportedError, match=r"lcm.safetensors is a whole LCM UNet.*LCM LoRA"):
        open_model(tmp_path / "lcm.safetensors")
