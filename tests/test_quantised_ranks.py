"""Quantised files on four ranks: the picture of their values, whatever the mesh, patches on them or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_files import bare_fp8, bitsandbytes, scaled_fp8, write_gguf, write_quantised
from safetensors.torch import load_file, save_file
from test_unet import conditioning as unet_conditioning
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel, WeightPatches
from parallel_backend.checkpoint_files.patch_file import LowRank, Whole
from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

FILES = ("scaled_fp8", "bare_fp8", "nvfp4", "nf4_double", "Q4_K", "unet_scaled", "unet_bare", "unet_nf4", "unet_Q8_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, unets: Path) -> Path:
    """Each file, and beside it in the folder `values` one of its values."""
    folder = tmp_path_factory.mktemp("quantised")
    dense = load_file(write_mmdit(folder / "dense.safetensors", small_config("sd3.5-medium", 4)))
    unet = load_file(unets / "unet-tiny.safetensors")
    for form in ("scaled fp8", "bare fp8", "nvfp4", "nf4, double", "Q4_K"):
        write_quantised(folder, dense, form)
    save_file(scaled_fp8(unet), folder / "unet_scaled.safetensors")
    save_file(bare_fp8(unet), folder / "unet_bare.safetensors")
    save_file(bitsandbytes(unet), folder / "unet_nf4.safetensors")
    write_gguf(folder / "unet_Q8_0.gguf", unet, "Q8_0", "sdxl")
    (folder / "values").mkdir()
    for name in FILES:
        values = {n: tensor.float().contiguous() for n, tensor in WholeFile(file(folder, name)).items()}
        save_file(values, folder / "values" / f"{name}.safetensors")
    return folder


def file(folder: Path, name: str) -> Path:
    return next(path for path in folder.iterdir() if path.stem == name)


def drawn(model: RemoteModel, **settings: Any) -> Tensor:
    if model.family == "sdxl":
        prompts, latent = (unet_conditioning(1), unet_conditioning(2, 154)), torch.zeros(1, 4, 21, 12)
    else:
        prompts, latent = (Conditioning(*random_prompt(1)), Conditioning(*random_prompt(2))), torch.zeros(1, 16, 14, 10)
    return model.sample(latent, *prompts, steps=2, seed=3, cfg_scale=4.0, **settings)


def pair(backend: Backend, folder: Path, name: str, mesh: MeshSpec) -> tuple[RemoteModel, RemoteModel]:
    values = folder / "values" / f"{name}.safetensors"
    return tuple(backend.load_model(path, mesh, "float32") for path in (file(folder, name), values))  # type: ignore[return-value]


TP, PP, ULYSSES = MeshSpec(tp=4), MeshSpec(pp=2, tp=2), MeshSpec(cfg=2, ulysses=2)
BANDS, SLICED = MeshSpec(patch=4), MeshSpec(cfg=2, patch=2, sliced=True)
CASES = [
    *(("scaled_fp8", mesh) for mesh in (TP, PP, ULYSSES)),
    *(("bare_fp8", TP), ("nvfp4", PP), ("nf4_double", TP), ("nf4_double", PP), ("Q4_K", TP)),
    *(
        ("unet_scaled", BANDS),
        ("unet_bare", SLICED),
        ("unet_nf4", BANDS),
        ("unet_nf4", SLICED),
        ("unet_Q8_0", BANDS),
        ("unet_Q8_0", SLICED),
    ),
]


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=lambda v: v.describe() if isinstance(v, MeshSpec) else v)
def test_the_picture_is_that_of_the_values(name: str, mesh: MeshSpec, backend4: Backend, folder: Path) -> None:
    quantised, values = pair(backend4, folder, name, mesh)
    assert_alike(drawn(quantised), drawn(values))
    assert max(quantised.loaded.resident_bytes) < 0.8 * max(values.loaded.resident_bytes)
    if mesh.patch > 1 or mesh.pp > 1:
        assert_alike(drawn(quantised, warmup_steps=1), drawn(values, warmup_steps=1))


def assert_alike(picture: Tensor, expected: Tensor) -> None:
    """Kernels of convolutions are not laid out alike, so their sums aren't in one order."""
    assert picture.std() > 0.1 and (picture - expected).abs().max() <= 5e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["scaled_fp8", "nf4_double", "Q4_K", "unet_bare"])
def test_patches_come_go_and_take_turns_on_quantised_weights(name: str, backend4: Backend, folder: Path) -> None:
    meshes = {"unet_bare": MeshSpec(cfg=2, patch=2, sliced=True)}
    quantised, values = pair(backend4, folder, name, meshes.get(name, MeshSpec(pp=2, tp=2)))
    shapes = {n: tensor.shape for n, tensor in load_file(folder / "values" / f"{name}.safetensors").items()}
    weight = next(n for n in shapes if n.endswith(("ff.net.2.weight", "1.x_block.mlp.fc2.weight")))
    rows, columns = shapes[weight]
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(*shape, generator=generator) / 4 for shape in ((rows, 3), (3, columns)))
    product = LowRank(weight, up, down)
    part = LowRank(weight, up[:7], down, row=5)
    other = Whole(weight, (rows, columns), torch.float32, lambda: torch.randn(rows, columns, generator=generator) / 16)
    plain = drawn(quantised)
    for patches in (
        WeightPatches([(product, 0.5)], []),
        WeightPatches([(product, 0.5), (part, -1.0)], []),
        WeightPatches([], [other]),
        WeightPatches([(part, 2.0)], []),
    ):
        laid, expected = (drawn(model, patches=patches) for model in (quantised, values))
        assert_alike(laid, expected)
        assert (laid - plain).abs().max() > 1e-3
    assert torch.equal(drawn(quantised), plain)
