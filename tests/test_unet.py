"""SDXL's UNet through a backend: whole pictures, what they cost, and which files and requests are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unet_inputs import inputs, unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.bench.quality import Subject, print_table
from parallel_backend.config import UNET_AXES
from parallel_backend.distributed.mesh import MeshAxis
from parallel_backend.errors import (
    BackendError,
    CancelledError,
    CheckpointError,
    ConfigError,
    InputError,
    UnsupportedError,
)
from parallel_backend.models.unet_checkpoint import open_unet
from parallel_backend.small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet, unet_tensors, write_unet

WARMED = {"steps": 3, "seed": 3, "cfg_scale": 4.0, "scheduler": "normal"}


def conditioning(seed: int, tokens: int = 77) -> Conditioning:
    return Conditioning(*unet_prompt(CONFIGS["tiny"], seed, tokens))


def sample(backend: Backend, path: Path, mesh: MeshSpec | None, **settings: Any) -> Tensor:
    model = backend.load_model(path, mesh, "float32")
    latent = settings.pop("latent", torch.zeros(1, 4, 20, 12))
    return model.sample(latent, conditioning(1), conditioning(2, settings.pop("tokens", 77)), **WARMED | settings)


def whole(backend: Backend, unets: Path, mesh: MeshSpec, tokens: int, warmup_steps: int | None = None) -> Tensor:
    """Three pictures of two steps."""
    settings = {"latent": torch.zeros(3, 4, 20, 12), "tokens": tokens, "steps": 2, "warmup_steps": warmup_steps}
    return sample(backend, unets / "unet-tiny.safetensors", mesh, **settings)


@pytest.fixture(scope="module")
def alone_by_tokens(backend4: Backend, unets: Path) -> dict[int, Tensor]:
    """Each picture computed whole by one rank."""
    return {tokens: whole(backend4, unets, MeshSpec(dp=4), tokens) for tokens in (77, 154)}


# Prompts of two lengths are two branches: on one rank and on two, in bands. Shares of the pictures know nothing of it.
@pytest.mark.parametrize(
    ("mesh", "tokens"),
    [
        *((mesh, 77) for mesh in MeshSpec.all_of(4, UNET_AXES)),
        *((mesh, 154) for mesh in (MeshSpec(patch=4), MeshSpec(cfg=2, patch=2))),
    ],
    ids=lambda value: value.describe() if isinstance(value, MeshSpec) else None,
)
def test_whole_pictures_are_those_of_one_process(
    mesh: MeshSpec, tokens: int, backend4: Backend, unets: Path, alone_by_tokens: dict[int, Tensor]
) -> None:
    alone = alone_by_tokens[tokens]
    ours = whole(backend4, unets, mesh, tokens)
    assert alone.std() > 0.1
    assert (ours - alone).abs().max() <= 5e-5 * alone.abs().max()
    # Warm-up over all steps goes the displaced way without being displaced.
    assert torch.equal(whole(backend4, unets, mesh, tokens, warmup_steps=2), ours)
    displaced = whole(backend4, unets, mesh, tokens, warmup_steps=1)
    assert torch.isfinite(displaced).all()
    assert torch.equal(displaced, ours) == (mesh.patch == 1)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde", "euler_ancestral"])
def test_displaced_pictures_come_nearer_with_warm_up(sampler: str, backend2: Backend, unets: Path) -> None:
    path, settings = unets / "unet-tiny.safetensors", {"steps": 6, "sampler": sampler, "cfg_scale": 1.0}
    exact = sample(backend2, path, MeshSpec(patch=2), **settings)
    errors = [
        float((sample(backend2, path, MeshSpec(patch=2), warmup_steps=w, **settings) - exact).norm() / exact.norm())
        for w in (1, 4)
    ]
    assert errors[1] < errors[0] < 1


@pytest.mark.parametrize(
    "mesh",
    [MeshSpec(cfg=2, patch=2), MeshSpec(dp=2, patch=2)],
    ids=MeshSpec.describe,
)
def test_sliced_weights_change_memory_and_nothing_else(mesh: MeshSpec, backend4: Backend, unets: Path) -> None:
    backend, path = backend4, unets / "unet-tiny.safetensors"
    sliced = msgspec.structs.replace(mesh, sliced=True)
    loads = [backend.load_model(path, spec, "float32").loaded for spec in (mesh, sliced)]
    whole, part = (max(loaded.resident_bytes) for loaded in loads)
    assert part < (0.75 if mesh.dp == 2 else 0.6) * whole
    assert torch.equal(sample(backend, path, sliced, tokens=154), sample(backend, path, mesh, tokens=154))
    expected = sample(backend, path, mesh, warmup_steps=1)
    assert torch.equal(sample(backend, path, sliced, warmup_steps=1), expected)
    with pytest.raises(CancelledError):
        sample(backend, path, sliced, warmup_steps=1, steps=50, seed=8, should_cancel=After(4))
    assert torch.equal(sample(backend, path, sliced, warmup_steps=1), expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mesh", [MeshSpec(cfg=2), MeshSpec(dp=2), MeshSpec(dp=2, cfg=2)], ids=MeshSpec.describe)
def test_sliced_weights_serve_single_calls_with_fewer_rows_than_ranks(
    rows: int, mesh: MeshSpec, backend2: Backend, backend4: Backend, unets: Path
) -> None:
    given, backend = inputs("tiny", (rows, 10, 12)), (backend2 if mesh.world_size == 2 else backend4)
    path, sliced = unets / "unet-tiny.safetensors", msgspec.structs.replace(mesh, sliced=True)
    whole, parts = (backend.load_model(path, spec, "float32").forward(*given) for spec in (mesh, sliced))
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()


def test_nothing_stale_survives_a_request(backend2: Backend, unets: Path) -> None:
    """A displaced job, a cancelled one, another size and another prompt leave no trace in the next."""
    path, mesh = unets / "unet-tiny.safetensors", MeshSpec(patch=2)
    first = sample(backend2, path, mesh, warmup_steps=1)
    sample(backend2, path, mesh, warmup_steps=1, latent=torch.zeros(1, 4, 29, 17), tokens=154)
    with pytest.raises(CancelledError):
        sample(backend2, path, mesh, warmup_steps=1, steps=50, seed=8, should_cancel=After(4))
    assert torch.equal(sample(backend2, path, mesh, warmup_steps=1), first)


class After:
    """True from the so-many-th time it is asked."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_left_open_the_mesh_is_cfg_and_bands(backend4: Backend, unets: Path) -> None:
    backend4.load_model(unets / "unet-tiny.safetensors", None, "float32")
    assert "cfg=2 patch=2" in [state.mesh for state in backend4.status().models]


def test_bytes_sent_are_those_that_the_method_needs(backend2: Backend, unets: Path) -> None:
    """Counted in the collectives, beside a sum over the layers of what bands share. Both within 5 %."""
    path, config = unets / "unet-tiny.safetensors", CONFIGS["tiny"]
    rows, columns, steps = 32, 24, 5
    model = backend2.load_model(path, MeshSpec(patch=2), "float32")
    latent = torch.zeros(1, 4, rows, columns)
    needed = needed_bytes(path, rows, columns)
    for warmup in (None, 1):
        model.sample(latent, conditioning(1), None, steps=steps, seed=1, cfg_scale=1.0, warmup_steps=warmup)
        assert model.last is not None
        (cost,) = model.last.costs
        assert cost.axis == "patch" and cost.waited > 0
        assert abs(cost.sent_bytes / steps / needed - 1) < 0.05, config


def needed_bytes(path: Path, rows: int, columns: int) -> int:
    """What rank 0 of two sends in an evaluation of one picture in fp32: rows, statistics, keys and values, the output.

    Rows go to all ranks with the statistics: both its first and its last ones. Those before an upsampling are half as wide.
    """
    total = 4 * (rows // 2) * columns
    for name, shape, level in layers_of(path):
        height, width = rows // 2**level, columns // 2**level
        if name == "halo":
            total += shape * width
        elif name == "norm":
            total += 2 * 32
        else:
            total += 2 * shape * (height // 2) * width
    return 4 * total


def layers_of(path: Path) -> list[tuple[str, int, int]]:
    """(what is shared, channels, level of the scale) of each layer of the tiny UNet, told from its names alone."""
    tensors = load_file(path)
    levels = {"input_blocks.1": 0, "input_blocks.2": 0, "input_blocks.3": 1, "input_blocks.4": 1, "input_blocks.5": 2}
    levels |= {"middle_block": 2, "output_blocks.0": 2, "output_blocks.1": 2, "output_blocks.2": 1, "out.": 0}
    levels |= {"output_blocks.3": 1, "output_blocks.4": 0, "output_blocks.5": 0}
    found = []
    for name, tensor in tensors.items():
        level = next((lv for prefix, lv in levels.items() if name.startswith(prefix)), None)
        if level is None or not name.endswith("weight"):
            continue
        if tensor.ndim == 4 and tensor.shape[2] == 3:
            sides = 1 if name.endswith(".op.weight") else 2  # a stride of 2 sees no row below
            found.append(("halo", sides * tensor.shape[1], level))
        elif name.endswith("attn1.to_k.weight"):
            found.append(("kv", tensor.shape[0], level))
        elif tensor.ndim == 1 and ("_layers.0" in name or name.endswith(".1.norm.weight") or name == "out.0.weight"):
            found.append(("norm", tensor.shape[0], level))
    return found


def test_the_quality_figure_is_exact_with_full_warm_up_and_beats_bands_alone(
    capsys: pytest.CaptureFixture[str], backend2: Backend, unets: Path
) -> None:
    subject = Subject(unets / "unet-tiny.safetensors", Conditioning(*random_sdxl_prompt(1)))
    print_table(backend2, subject, [1], 3, 128)
    rows = [line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 2")]
    (_, warmup, output, alone, ratio, _), (_, everything, *_, end) = rows
    assert (warmup, everything) == ("1", "all") and float(end) == 0
    assert 0 < float(output) < float(alone) and float(ratio) >= 1


# -- files --------------------------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_weights(tmp_path: Path, unets: Path) -> None:
    config = CONFIGS["tiny"]
    whole = write_unet(tmp_path / "whole.safetensors", config, "single file", prefix="model.diffusion_model.")
    folder = tmp_path / "folder"
    model = random_unet(config)
    folder.mkdir()
    named = {n.replace("class_embedding.", "add_embedding."): t.contiguous() for n, t in model.state_dict().items()}
    save_file(named, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    sources = [open_unet(path) for path in (unets / "unet-tiny.safetensors", whole, folder)]
    assert {c for _, c in sources} == {config}
    first = sources[0][0]
    for source, _ in sources[1:]:
        assert sorted(source.names()) == sorted(first.names())
        assert all(torch.equal(source.read(n), first.read(n)) for n in first.names())
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    joined = torch.cat([model.get_submodule(f"{name}.to_{part}").weight for part in "qkv"])
    assert torch.equal(first.read(f"{name}.to_qkv.weight"), joined)


@pytest.mark.parametrize("flags", [(), ("v_pred",), ("v_pred", "ztsnr")], ids=str)
def test_the_file_says_what_the_output_means(flags: tuple[str, ...], tmp_path: Path) -> None:
    extra = {name: torch.zeros(0) for name in flags}
    _, config = open_unet(write_unet(tmp_path / "m.safetensors", CONFIGS["tiny"], "single file", extra=extra))
    assert (config.v_prediction, config.zero_snr) == ("v_pred" in flags, "ztsnr" in flags)


def changed(path: Path, **changes: Tensor | None) -> Path:
    tensors: dict[str, Tensor | None] = {**unet_tensors(CONFIGS["tiny"], "single file"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input_blocks.0.0.weight": torch.zeros(64, 3, 3, 3)}, UnsupportedError, "takes 3 channels and gives 4"),
        (
            {"out.2.weight": torch.zeros(8, 64, 3, 3), "out.2.bias": torch.zeros(8)},
            UnsupportedError,
            "takes 4 channels and gives 8; SDXL's latents have 4",
        ),
        ({"label_emb.0.0.weight": None}, UnsupportedError, "without micro-conditioning"),
        ({"label_emb.0.0.weight": torch.zeros(256, 1000)}, UnsupportedError, "widths 2048 and 1000"),
        ({"edm_vpred.sigma_max": torch.zeros(())}, CheckpointError, "marks of EDM that can't be used: sigma_max=0.0"),
        ({"edm_vpred.sigma_max": torch.zeros(2)}, CheckpointError, "edm_vpred.sigma_max is not one number"),
        ({"out.2.bias": None}, CheckpointError, "(?s)1 missing.*missing: conv_out.bias"),
        ({"out.2.bias": torch.zeros(5)}, CheckpointError, "out_?.*bias has shape"),
    ],
    ids=["in", "out", "sd1", "widths", "edm range", "edm numbers", "missing", "shape"],
)
def test_files_of_other_kinds_are_refused_by_name(
    changes: dict[str, Tensor | None],
    error: type[BackendError],
    words: str,
    backend2: Backend,
    unets: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        backend2.load_model(changed(tmp_path / "bad.safetensors", **changes), MeshSpec(patch=2), "float32")
    assert sample(backend2, unets / "unet-tiny.safetensors", MeshSpec(patch=2), steps=1).std() > 0


def test_axes_of_the_other_kind_are_refused_by_name(backend2: Backend, models: Path, unets: Path) -> None:
    with pytest.raises(ConfigError, match=r"ring=2 can't be used on sdxl: its axes are dp, cfg, patch"):
        backend2.load_model(unets / "unet-tiny.safetensors", MeshSpec(ring=2), "float32")
    with pytest.raises(ConfigError, match=r"patch=2 can't be used on sd3.5-large"):
        backend2.load_model(models / "diffusion_models" / "sd3.5-large.safetensors", MeshSpec(patch=2), "float32")


def test_requests_that_dont_fit_name_the_remedy(backend2: Backend, models: Path, unets: Path) -> None:
    path, mesh = unets / "unet-tiny.safetensors", MeshSpec(patch=2)
    with pytest.raises(InputError, match=r"this model needs \(batch, 4"):
        sample(backend2, path, mesh, latent=torch.zeros(1, 16, 20, 12))
    refiner = backend2.load_model(unets / "unet-refiner.safetensors", mesh, "float32")
    with pytest.raises(InputError, match="base and refiner have different ones"):
        refiner.sample(torch.zeros(1, 4, 32, 16), conditioning(1), None, steps=2)
    mmdit = backend2.load_model(models / "diffusion_models" / "sd3.5-large.safetensors", MeshSpec(cfg=2), "float32")
    with pytest.raises(UnsupportedError, match=r"two or more pp or ring ranks; here is cfg=2"):
        mmdit.sample(torch.zeros(1, 16, 8, 8), Conditioning(*random_prompt(1)), None, steps=4, warmup_steps=1)
    with pytest.raises(ConfigError, match="warmup_steps=-1"):
        sample(backend2, path, mesh, warmup_steps=-1)
    assert sample(backend2, path, mesh).std() > 0


def test_sizes_and_pooled_make_the_same_micro_conditioning_as_one_vector(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / "unet-tiny.safetensors", None, "float32")
    context, y = unet_prompt(CONFIGS["tiny"], 1)
    parted = Conditioning(context, y[:, :1280], sizes=(1024, 1024, 0, 0, 1024, 1024))
    latent = torch.zeros(1, 4, 12, 12)
    assert torch.equal(*(model.sample(latent, prompt, None, steps=2) for prompt in (Conditioning(context, y), parted)))


def test_axis_of_one_rank_sends_nothing() -> None:
    assert MeshAxis("patch").traffic.sent_bytes == 0
    assert replace(CONFIGS["tiny"], mid_depth=None).diffusers()["mid_block_type"] is None
