"""SD3 from scratch: equal to its own code, on every mesh, from its pickles and from what `convert` makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from from_scratch_reference import find_clone, reference_model
from local_network import evaluated, local_network
from safetensors.torch import load_file
from torch import Tensor

from parallel_backend import Backend, Conditioning
from parallel_backend.__main__ import main
from parallel_backend.config import MeshSpec, SamplerSpec
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import Step
from parallel_backend.errors import CheckpointError, UnsupportedError
from parallel_backend.models.families import open_model
from parallel_backend.models.from_scratch import FromScratch, FromScratchConfig
from parallel_backend.rank.one_process import OneProcess

PARAMS: dict[str, Any] = {
    "inCh": 16,
    "class_dim": 32,
    "patch_size": 2,
    "dim": 120,
    "hidden_scale": 2.0,
    "num_heads": 5,
    "num_blocks": 3,
    "attn_type": "softmax_flash",
    "MLP_type": "swiglu",
    "positional_encoding": "RoPE2d",
    "max_res_orig": 256,
    "max_res": 256,
    "kv_merge_attn": False,
    "qk_half_dim": False,
    "text_loss": False,
}
SHAPES = [(1, 8, 8, 154), (2, 6, 10, 91)]


def write_pickle(folder: Path, **changes: Any) -> Path:
    """Random weights of our own model, stored as the reference stores them."""
    params = PARAMS | changes
    config = FromScratchConfig(
        depth=params["num_blocks"],
        heads=params["num_heads"],
        hidden=params["dim"],
        channels=16,
        mlp_width=int(params["dim"] * params["hidden_scale"]),
        mlp=params["MLP_type"],
        patch_size=2,
        rotary=params["positional_encoding"] == "RoPE2d",
        context_width=2304,
        pooled_width=32,
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in FromScratch(config, build_mesh(MeshSpec()), "native").named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        tensors[name] = values / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * values
        if name.endswith("freqs"):
            tensors[name] = 10_000.0 ** (-torch.arange(parameter.shape[0]) / parameter.shape[0])
    tensors["time_scale"] = torch.tensor([998.5])
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "model_ema_10s.pkl")
    (folder / "model_params_10s.json").write_text(json.dumps(params))
    return folder / "model_ema_10s.pkl"


def inputs(rows: int, height: int, width: int, text: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 16, height, width, generator=generator)
    context = 30 * torch.randn(rows, text, 2304, generator=generator)
    return x, torch.full((rows,), 700.0), context, torch.randn(rows, 32, generator=generator)


@torch.inference_mode()
def velocity(path: Path, mesh: MeshSpec, shape: tuple[int, int, int, int]) -> Tensor:
    return evaluated(local_network(path, build_mesh(mesh)), *inputs(*shape), Step())


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickle(tmp_path_factory.mktemp("scratch"))


@pytest.mark.parametrize("mlp", ["swiglu", "swiglu_old", "gelu"])
@pytest.mark.parametrize("positions", ["RoPE2d", "NoPE"])
@pytest.mark.parametrize("shape", [(1, 8, 8, 154), (2, 6, 10, 154)], ids=str)
def test_velocity_equals_the_repositorys_own_code(
    mlp: str, positions: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    clone = find_clone()
    if isinstance(clone, str):
        pytest.skip(clone)
    path = write_pickle(tmp_path, MLP_type=mlp, positional_encoding=positions, attn_type="softmax")
    settings = PARAMS | {"MLP_type": mlp, "positional_encoding": positions, "attn_type": "softmax"}
    reference = reference_model(clone, **settings)
    reference.load_state_dict(torch.load(path, weights_only=True), strict=True)
    x, timesteps, context, pooled = inputs(*shape)
    with torch.inference_mode():
        expected = reference(x.clone(), timesteps / 1000, context.clone(), pooled.clone())
    ours = velocity(path, MeshSpec(), shape)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def check(backend: Backend, mesh: MeshSpec, path: Path, shape: tuple[int, int, int, int]) -> None:
    local = backend.load_model(path, mesh, "float32").forward(*inputs(*shape))
    expected = velocity(path, MeshSpec(), shape)
    assert (local - expected).abs().max() <= 1e-5 * expected.abs().max()


# The batch axis is the same for all families: test_parity has it, and cfg beside the others, which here is one of two.
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mesh", [m for m in MeshSpec.all_of(2) if m.dp == 1], ids=MeshSpec.describe)
def test_velocity_on_two_ranks(
    mesh: MeshSpec, shape: tuple[int, int, int, int], pickled: Path, backend2: Backend
) -> None:
    check(backend2, mesh, pickled, shape)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize(
    "mesh", [m for m in MeshSpec.all_of(4) if m.dp * m.cfg == 1 and m.pp < 4], ids=MeshSpec.describe
)
def test_velocity_on_four_ranks(
    mesh: MeshSpec, shape: tuple[int, int, int, int], pickled: Path, backend4: Backend
) -> None:
    check(backend4, mesh, pickled, shape)


@pytest.mark.parametrize("sampler", ["euler", "euler_stochastic", "heun"])
def test_sampling_on_two_ranks_equals_one(sampler: str, pickled: Path, backend2: Backend) -> None:
    positive, negative = (Conditioning(*inputs(1, 8, 8, tokens)[2:]) for tokens in (154, 77))
    latent = torch.zeros(1, 16, 10, 6)
    settings: dict[str, Any] = {"seed": 2, "steps": 4, "cfg_scale": 5.0, "shift": 1.0}
    model = backend2.load_model(pickled, MeshSpec(cfg=2), "float32")
    ours = model.sample(latent, positive, negative, sampler=sampler, **settings)
    alone = OneProcess(pickled).sample(latent, positive, negative, SamplerSpec(sampler, **settings))
    assert (ours - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_convert_keeps_names_and_values(pickled: Path, tmp_path: Path) -> None:
    made = tmp_path / "model.safetensors"
    assert main(["convert", str(pickled), str(made)]) == 0
    tensors, original = load_file(made), torch.load(pickled, weights_only=True)
    assert tensors.keys() == original.keys() and all(torch.equal(tensors[n], original[n]) for n in original)
    assert torch.equal(velocity(made, MeshSpec(), SHAPES[0]), velocity(pickled, MeshSpec(), SHAPES[0]))


def test_a_link_to_a_pickle_without_a_name_is_opened_by_its_own(pickled: Path, tmp_path: Path) -> None:
    blob = tmp_path / "0123abcd"
    blob.write_bytes(pickled.read_bytes())
    (tmp_path / pickled.name).symlink_to(blob)
    (tmp_path / "model_params_10s.json").write_bytes((pickled.parent / "model_params_10s.json").read_bytes())
    assert open_model(tmp_path / pickled.name).source.path.name == pickled.name


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo this must not run",)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    torch.save({"weight": Evil()}, tmp_path / "model_ema_10s.pkl")
    with pytest.raises(CheckpointError, match="opening it would run code"):
        open_model(tmp_path / "model_ema_10s.pkl")
    assert "this must not run" not in capfd.readouterr().out


def test_damaged_incomplete_and_unsupported_files_are_named(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "model_ema_1s.pkl").write_bytes(pickled.read_bytes()[:10_000])
    with pytest.raises(CheckpointError, match=r"model_ema_1s.pkl can't be read"):
        open_model(tmp_path / "model_ema_1s.pkl")
    (tmp_path / "model_ema_2s.pkl").write_bytes(pickled.read_bytes())
    with pytest.raises(CheckpointError, match=r"needs model_params_2s.json beside it"):
        open_model(tmp_path / "model_ema_2s.pkl")
    torch.save({"other": torch.zeros(2)}, tmp_path / "model_ema_3s.pkl")
    with pytest.raises(CheckpointError, match=r"model_ema_3s.pkl is something this version doesn't know"):
        open_model(tmp_path / "model_ema_3s.pkl")
    cosine = write_pickle(tmp_path / "cosine")
    (cosine.parent / "model_params_10s.json").write_text(json.dumps(PARAMS | {"attn_type": "cosine"}))
    with pytest.raises(UnsupportedError, match=r"attn_type='cosine'.*'softmax' or 'softmax_flash'"):
        open_model(cosine)
