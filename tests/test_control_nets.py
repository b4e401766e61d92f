"""ControlNets that ranks hold, through a backend: one result on every mesh, who leaves with whom, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import EMPTY, NEGATIVE, POSITIVE
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import (
    Backend,
    Conditioning,
    ControlUse,
    MeshSpec,
    RemoteControl,
    RemoteModel,
    WeightPatches,
)
from parallel_backend.checkpoint_files.patch_file import LowRank
from parallel_backend.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from parallel_backend.small_checkpoints.mmdit import small_config
from parallel_backend.small_checkpoints.mmdit_control import INSTANTX, STABILITY, write_control
from parallel_backend.small_checkpoints.unet import CONFIGS
from parallel_backend.small_checkpoints.unet_control import control_config, control_lora_tensors, write_unet_control

SDXL = [Conditioning(*unet_prompt(CONFIGS["tiny"], seed)) for seed in (1, 2)]
LATENT = torch.zeros(1, 4, 12, 10)
UNET_MESHES = [MeshSpec(patch=2), MeshSpec(cfg=2), MeshSpec(patch=2, sliced=True), MeshSpec(cfg=2, sliced=True)]


def pixels(seed: int = 1, rows: int = 96, columns: int = 80) -> Tensor:
    return torch.rand(1, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def control_file(unets: Path) -> Path:
    return write_unet_control(unets / "control-tiny.safetensors", control_config(CONFIGS["tiny"]), "single file")


@pytest.fixture(scope="module")
def mmdit_controls(models: Path) -> dict[str, Path]:
    base, folder = small_config("sd3.5-large"), models / "diffusion_models"
    return {kind: write_control(folder / f"{kind}.safetensors", kind, base) for kind in (INSTANTX, STABILITY)}


@pytest.fixture(scope="module")
def unet_file(unets: Path) -> Path:
    return unets / "unet-tiny.safetensors"


def drawn(model: RemoteModel, *controls: ControlUse, **settings: Any) -> Tensor:
    settings = {"steps": 3, "seed": 3, "cfg_scale": 4.0} | settings
    return model.sample(LATENT, SDXL[0], SDXL[1], controls=controls, **settings)


def uses(net: RemoteControl) -> list[ControlUse]:
    """Twice on one prompt, with ranges."""
    return [ControlUse(net, pixels(1), 0.8, end=2.0), ControlUse(net, pixels(2), 0.5, start=9.0)]


def largest_error(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("mesh", UNET_MESHES[1:], ids=MeshSpec.describe)
def test_each_mesh_gives_the_same_picture(
    mesh: MeshSpec, backend2: Backend, unet_file: Path, control_file: Path
) -> None:
    """On both prompts and on one: ranks that share slices of the UNet don't wait for a ControlNet that the others haven't."""
    pictures = []
    for each in (UNET_MESHES[0], mesh):
        model = backend2.load_model(unet_file, each, "float32")
        net = backend2.load_control(control_file, model)
        pictures.append([drawn(model, *uses(net)), drawn(model, *uses(net), negative_controls=()), drawn(model)])
    for out, expected in zip(*pictures, strict=True):
        assert largest_error(out, expected) < 2e-5
    both, one, without = pictures[0]
    assert min(largest_error(both, one), largest_error(both, without), largest_error(one, without)) > 1e-2


def test_displaced_pictures_are_near_and_exact_with_warm_up(
    backend2: Backend, unet_file: Path, control_file: Path
) -> None:
    model = backend2.load_model(unet_file, MeshSpec(patch=2), "float32")
    controls = uses(backend2.load_control(control_file, model))
    exact, displaced, warm = (drawn(model, *controls, steps=6, warmup_steps=warmup) for warmup in (None, 2, 6))
    assert torch.equal(exact, warm)
    without = drawn(model, steps=6)
    assert 0 < largest_error(displaced, exact) < largest_error(without, exact) / 5


@pytest.mark.parametrize(
    "mesh", [MeshSpec(ring=2), MeshSpec(tp=2), MeshSpec(pp=2), MeshSpec(cfg=2)], ids=MeshSpec.describe
)
@pytest.mark.parametrize("kind", [INSTANTX, STABILITY])
def test_transformers_too(
    kind: str, mesh: MeshSpec, backend2: Backend, large: Path, mmdit_controls: dict[str, Path]
) -> None:
    hint = torch.randn(1, 16, *EMPTY.shape[2:], generator=torch.Generator().manual_seed(7))
    pictures = []
    for each in (MeshSpec(ulysses=2), mesh):
        model = backend2.load_model(large, each, "float32")
        use = ControlUse(backend2.load_control(mmdit_controls[kind], model), hint, 0.7, end=0.2)
        job = {"steps": 3, "seed": 1}
        pictures.append([model.sample(EMPTY, POSITIVE, NEGATIVE, controls=[use], **job)])
        pictures[-1].append(model.sample(EMPTY, POSITIVE, NEGATIVE, **job))
    assert largest_error(pictures[1][0], pictures[0][0]) < 2e-5
    assert largest_error(pictures[0][1], pictures[0][0]) > 1e-2


def test_patches_at_different_steps_and_a_displaced_ring(
    backend2: Backend, large: Path, mmdit_controls: dict[str, Path]
) -> None:
    hint = torch.randn(1, 16, *EMPTY.shape[2:], generator=torch.Generator().manual_seed(7))

    def sample(mesh: MeshSpec, warmup: int | None) -> Tensor:
        model = backend2.load_model(large, mesh, "float32")
        use = ControlUse(backend2.load_control(mmdit_controls[STABILITY], model), hint)
        return model.sample(EMPTY, POSITIVE, NEGATIVE, controls=[use], steps=4, seed=1, warmup_steps=warmup)

    with pytest.raises(
        UnsupportedError, match=r"ControlNets in the ranks .* at different steps\. .* set ring in place of pp"
    ):
        sample(MeshSpec(pp=2), 1)
    exact, displaced = (sample(MeshSpec(ring=2), warmup) for warmup in (None, 1))
    assert 0 < largest_error(displaced, exact) < 0.2


def test_it_is_loaded_once_leaves_with_its_model_and_comes_back(
    backend2: Backend, unet_file: Path, control_file: Path
) -> None:
    model = backend2.load_model(unet_file, MeshSpec(patch=2), "float32")
    net = backend2.load_control(control_file, model)
    first = drawn(model, *uses(net))
    jobs = backend2.status().jobs_done
    assert backend2.load_control(control_file, model) is net and backend2.status().jobs_done == jobs
    assert (
        sum(backend2.load_control(control_file, RemoteModel(backend2, model.load, model.loaded)).loaded.bytes_read) == 0
    )
    names = [state.model for state in backend2.status().models]
    assert {model.name, net.name} <= set(names)
    backend2.unload([model.name])
    assert not {model.name, net.name} & {state.model for state in backend2.status().models}
    assert torch.equal(drawn(model, *uses(net)), first)
    backend2.unload([net.name])
    assert torch.equal(drawn(model, *uses(net)), first)
    backend2.unload([net.name])
    assert all(backend2.load_control(control_file, model).loaded.bytes_read)
    assert (
        model.forward(
            torch.zeros(1, 4, 12, 10), torch.tensor([500.0]), SDXL[0].context, SDXL[0].pooled, controls=uses(net)[:1]
        )
        .isfinite()
        .all()
    )


@pytest.fixture(scope="module")
def control_lora(unets: Path) -> Path:
    path = unets / "control-lora-tiny.safetensors"
    save_file(control_lora_tensors(control_config(CONFIGS["tiny"]), seed=6), path)
    return path


def test_a_control_lora_is_the_controlnet_of_the_sums(
    backend2: Backend, unet_file: Path, control_lora: Path, unets: Path
) -> None:
    summed, base = load_file(control_lora), load_file(unet_file)
    del summed["lora_controlnet"]
    for name in [name for name in summed if name.endswith(".up")]:
        stem = name.removesuffix(".up")
        up, down = summed.pop(name).flatten(1), summed.pop(f"{stem}.down").flatten(1)
        weight = base[f"{stem}.weight"]
        summed[f"{stem}.weight"] = weight + (up @ down).view(weight.shape)
    encoder = [n for n in base if n.startswith(("input_blocks.", "middle_block.", "time_embed.", "label_emb."))]
    save_file({name: base[name] for name in encoder} | summed, unets / "control-sums.safetensors")
    model = backend2.load_model(unet_file, MeshSpec(patch=2), "float32")
    of_pairs, of_sums = (
        drawn(model, *uses(backend2.load_control(path, model)))
        for path in (control_lora, unets / "control-sums.safetensors")
    )
    assert largest_error(of_pairs, of_sums) < 1e-5 and largest_error(of_pairs, drawn(model)) > 1e-2


def test_control_loras_that_can_not_be_are_named(
    backend2: Backend, unet_file: Path, control_lora: Path, unets: Path
) -> None:
    model = backend2.load_model(unet_file, MeshSpec(patch=2), "float32")
    net = backend2.load_control(control_lora, model)
    name = "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight"
    rows, columns = load_file(unet_file)[name].shape
    pair = LowRank(name, torch.ones(rows, 1), torch.ones(1, columns))
    with pytest.raises(
        UnsupportedError, match=r"control-lora-tiny\.safetensors is made of the model's weights, on which patches lie"
    ):
        drawn(model, *uses(net), patches=WeightPatches([(pair, 0.5)]))
    other = backend2.load_model(unets / "unet-refiner.safetensors", MeshSpec(patch=2), "float32")
    with pytest.raises((CheckpointError, UnsupportedError), match=control_lora.name):
        backend2.load_control(control_lora, other)
    in_fp8 = backend2.load_model(unet_file, MeshSpec(patch=2), "fp8", computes="float32")
    with pytest.raises(UnsupportedError, match="holds quantised"):
        backend2.load_control(control_lora, in_fp8)
    assert drawn(model, *uses(net)).isfinite().all()


def test_controlnets_without_room_are_named_once_and_their_model_stays(
    runtime_folder: Path, unet_file: Path, control_file: Path, tmp_path: Path
) -> None:
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in (unet_file, control_file)]
    second = Path(shutil.copy(control_file, tmp_path / "second.safetensors"))
    for share, named in (
        (1.5, "There is no room for"),
        (0.5, r"control-tiny\.safetensors and unet-tiny\.safetensors need"),
    ):
        budget = sizes[0] + round(share * sizes[1])
        backend = Backend(1, "cpu", "narrow", memory_budget=budget, idle_seconds=300)
        try:
            model = backend.load_model(unet_file, MeshSpec(), "float32")
            with pytest.raises(ConfigError, match=named):
                nets = [backend.load_control(path, model) for path in (control_file, second)]
                drawn(model, *(ControlUse(net, pixels()) for net in nets))
            assert model.name in [state.model for state in backend.status().models]
            assert drawn(model).isfinite().all()
        finally:
            backend.stop()


WRONG = [
    (lambda net: ControlUse(net, pixels(rows=64)), r"64 x 80 pixels .* a latent of 12 x 10 takes 96 x 80"),
    (lambda net: ControlUse(net, pixels()[:, :1]), r"has 1 channels; this ControlNet takes 3"),
    (lambda net: ControlUse(net, pixels().expand(3, -1, -1, -1)), r"\[3, 3, 96, 80\] came for 1 latents"),
    (lambda net: ControlUse(net, pixels()[0]), r"hint of shape \[3, 96, 80\]"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[words[:15] for _, words in WRONG])
def test_wrong_hints_are_named_and_the_next_job_works(
    make: Any, words: str, backend2: Backend, unet_file: Path, control_file: Path
) -> None:
    model = backend2.load_model(unet_file, MeshSpec(patch=2), "float32")
    net = backend2.load_control(control_file, model)
    with pytest.raises(InputError, match=words):
        drawn(model, make(net))
    assert drawn(model, *uses(net)).isfinite().all()


def test_controlnets_of_other_models_and_deleted_files_are_named(
    backend2: Backend, unet_file: Path, control_file: Path, mmdit_controls: dict[str, Path], large: Path, tmp_path: Path
) -> None:
    unet = backend2.load_model(unet_file, MeshSpec(patch=2), "float32")
    mmdit = backend2.load_model(large, MeshSpec(cfg=2), "float32")
    with pytest.raises(UnsupportedError, match="is a ControlNet of a UNet"):
        backend2.load_control(control_file, mmdit)
    with pytest.raises(
        (CheckpointError, UnsupportedError), match=f"{mmdit_controls[STABILITY].name} holds no ControlNet of a UNet"
    ):
        backend2.load_control(mmdit_controls[STABILITY], unet)
    copied = Path(shutil.copy(control_file, tmp_path / "copy.safetensors"))
    net = backend2.load_control(copied, unet)
    before = drawn(unet, *uses(net))
    copied.unlink()
    assert torch.equal(drawn(unet, *uses(net)), before)  # the ranks have it
    backend2.unload([net.name])
    with pytest.raises(CheckpointError, match=r"copy\.safetensors"):
        drawn(unet, *uses(net))
    other = backend2.load_control(control_file, unet)
    with pytest.raises(InputError, match="no ControlNet of this model"):
        mmdit.sample(EMPTY, POSITIVE, NEGATIVE, controls=[ControlUse(other, pixels())], steps=1)
    assert torch.equal(drawn(unet, *uses(other)), before)
