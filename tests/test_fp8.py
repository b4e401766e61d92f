"""Half-precision files held in fp8, and products in fp8: what the values are, what is held, and how ranks agree on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantised_files import bare_fp8, comfy_quant, scaled_fp8
from safetensors.torch import load_file, save_file
from test_checkpoint import CPU, UNREAD, mesh_position
from test_from_scratch import write_pickle
from test_quantised import joined_ranks, values_of
from test_quantised_ranks import BANDS, PP, SLICED, TP, ULYSSES, assert_alike, drawn
from torch import Tensor

from parallel_backend import Backend, MeshSpec
from parallel_backend.distributed.tensor_parallel import Shard
from parallel_backend.errors import ConfigError
from parallel_backend.models.checkpoint import bytes_held, load_parameters
from parallel_backend.models.families import open_model
from parallel_backend.models.fp8_source import scaled_by_row as quantised_by_row
from parallel_backend.quantized.forms import ScaledFP8
from parallel_backend.quantized.weight import Part, Product, QuantizedWeight, joined, multiply_in_fp8
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

E4M3 = torch.float8_e4m3fn
EDGES = ("x_embedder.", "final_layer.", "pos_embed", "input_blocks.0.0.", "out.2.")


def scaled_by_row(name: str, tensor: Tensor) -> Tensor:
    """The values of a weight that is held in fp8."""
    if tensor.ndim not in (2, 4) or name.startswith(EDGES):
        return tensor
    rows = tensor.float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True) / 448
    return ((rows / scale).to(E4M3).float() * scale).view(tensor.shape)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, unets: Path) -> Path:
    """Two files of half precision, the values of both in fp8, and files in fp8."""
    folder = tmp_path_factory.mktemp("fp8")
    mmdit = load_file(write_mmdit(folder / "dense.safetensors", small_config("sd3.5-medium", 4)))
    files = {"mmdit": mmdit, "unet": load_file(unets / "unet-tiny.safetensors")}
    for name, tensors in files.items():
        half = {n: tensor.half().contiguous() for n, tensor in tensors.items()}
        save_file(half, folder / f"{name}.safetensors")
        save_file({n: scaled_by_row(n, t).float() for n, t in half.items()}, folder / f"{name}-fp8.safetensors")
        for dtype in (E4M3, torch.float8_e5m2):
            as_cast = {n: cast(tensor, dtype) for n, tensor in half.items()}
            save_file(as_cast, folder / f"{name}-{str(dtype).removeprefix('torch.')}.safetensors")
    save_file(contiguous(comfy_quant(mmdit, "TensorCoreFP8Layout", "float8_e4m3fn")), folder / "scaled.safetensors")
    save_file(contiguous(scaled_fp8(mmdit)), folder / "in_full.safetensors")
    save_file(contiguous(bare_fp8(mmdit)), folder / "bare.safetensors")
    return folder


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("weights", ["fp8", "float8_e4m3fn", "float8_e5m2"])
def test_any_part_of_a_weight_has_the_values_of_the_whole(weights: str, folder: Path) -> None:
    opened, expected = (
        open_model(folder / "mmdit.safetensors", weights=weights),
        load_file(folder / f"mmdit-{weights}.safetensors"),
    )
    fc2 = "joint_blocks.1.x_block.mlp.fc2.weight"
    for name in (n for n in opened.source.names() if n != "pos_embed"):
        assert torch.equal(values_of(opened.source.read(name)).float(), expected[name].float()), name
    for dim, span in ((0, (5, 77)), (1, (128, 384))):
        part = values_of(opened.source.read(fc2, Shard(dim, (span,))))
        assert torch.equal(part, expected[fc2].narrow(dim, span[0], span[1] - span[0]))


def parameters(folder: Path, weights: str, degree: int, rank: int = 0) -> tuple[dict[str, Any], int, int]:
    """What a tp rank has; the bytes it was expected to hold, and those it read."""
    opened = open_model(folder / "mmdit.safetensors", weights=weights)
    with torch.device("meta"):
        model = opened.build(mesh_position(tp=(rank, degree)), "native")
    told = bytes_held(model, opened.source, torch.float16)
    load_parameters(model, opened.source, device=CPU, dtype=torch.float16, unread=UNREAD)
    return dict(model.named_parameters()), told, opened.source.bytes_read


@pytest.mark.parametrize("degree", [1, 3])
def test_slices_join_to_the_whole_and_take_half_the_memory(degree: int, folder: Path) -> None:
    whole = parameters(folder, "fp8", 1)[0]
    ranks = [parameters(folder, "fp8", degree, rank) for rank in range(degree)]
    weights, told, _ = ranks[0]
    held = sum(w.held_bytes if isinstance(w, QuantizedWeight) else w.nbytes for w in weights.values())
    half = sum(2 * weight.numel() for weight in weights.values())
    assert held <= 0.55 * half and told == pytest.approx(held, rel=0.02)
    for name in (n for n in whole if n.startswith("joint_blocks.1.") and n.endswith("weight")):
        if weights[name].shape != whole[name].shape:
            parts = [values_of(rank[0][name]) for rank in ranks]
            assert torch.equal(joined_ranks(name, parts), values_of(whole[name])), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_rows_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    tensor = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1e-4], [1e-2], [1], [10]])
    weight = quantised_by_row(tensor, None)
    exact, half = weight.parts[0].values(torch.float32), weight.parts[0].values(dtype)
    assert torch.equal(half, exact.to(dtype))


def test_a_row_of_zeros_stays_one(tmp_path: Path, folder: Path) -> None:
    tensors, name = load_file(folder / "mmdit.safetensors"), "joint_blocks.0.x_block.mlp.fc1.weight"
    tensors[name][3] = 0
    save_file(tensors, tmp_path / "m.safetensors")
    values = values_of(open_model(tmp_path / "m.safetensors", weights="fp8").source.read(name))
    assert not values[3].any() and values.isfinite().all() and values[4].any()


def test_the_layers_by_which_latents_come_in_and_go_out_stay(unets: Path, folder: Path, tmp_path: Path) -> None:
    for path in (folder / "mmdit.safetensors", unets / "unet-tiny.safetensors", write_pickle(tmp_path)):
        source = open_model(path, weights="fp8").source
        matrices = {name for name in source.names() if len(source.shape(name)) in (2, 4)}
        inside = {name for name in matrices if source.held_bytes(name, None) is not None}
        assert inside < matrices and not any(source.shape(name)[1] in (4, 16) for name in inside)


CASES = [
    *(("mmdit", "fp8", mesh) for mesh in (TP, PP, ULYSSES)),
    *(("unet", "fp8", BANDS), ("unet", "fp8", SLICED), ("unet", "float8_e4m3fn", BANDS), ("mmdit", "float8_e5m2", TP)),
]


@pytest.mark.parametrize(
    ("name", "weights", "mesh"), CASES, ids=lambda v: v.describe() if isinstance(v, MeshSpec) else v
)
def test_ranks_draw_the_picture_of_the_values(
    name: str, weights: str, mesh: MeshSpec, backend4: Backend, folder: Path
) -> None:
    values = backend4.load_model(folder / f"{name}-{weights}.safetensors", mesh, "float32")
    held = backend4.load_model(folder / f"{name}.safetensors", mesh, weights)
    assert_alike(drawn(held), drawn(values))
    assert held.load.held_in == f"float32+{weights}" and any(
        "computed in float32" in note for note in held.loaded.notes
    )
    assert max(held.loaded.resident_bytes) < (0.45 if mesh.sliced else 0.4) * max(values.loaded.resident_bytes)
    half = backend4.load_model(folder / f"{name}.safetensors", mesh, "float32")
    assert half.name != held.name
    of_half = drawn(half)
    assert 1e-3 < (of_half - drawn(held)).abs().max() / of_half.abs().max() < 0.5


def test_a_quantised_file_stays_as_it_is_and_an_unknown_type_is_named(backend2: Backend, folder: Path) -> None:
    as_file, asked = (
        backend2.load_model(folder / "scaled.safetensors", MeshSpec(tp=2), dtype) for dtype in ("float32", "fp8")
    )
    assert asked.name == as_file.name and not any(asked.loaded.bytes_read), "it is held once"
    assert any("stay quantised, as in the file" in note for note in as_file.loaded.notes)
    half, fast = (
        backend2.load_model(folder / "mmdit.safetensors", MeshSpec(tp=2), "float32", fast_fp8=fast, has_fp8=fast)
        for fast in (False, True)
    )
    assert half.name == fast.name
    values = load_file(folder / "bare.safetensors")
    as_e5m2 = open_model(folder / "bare.safetensors", weights="float8_e5m2").source
    for name in ("joint_blocks.0.x_block.mlp.fc1.weight", "joint_blocks.0.x_block.mlp.fc1.bias"):
        assert torch.equal(values_of(as_e5m2.read(name)), cast(values[name].float(), torch.float8_e5m2))
    with pytest.raises(ConfigError, match="dtype 'fp4' is not known"):
        backend2.load_model(folder / "mmdit.safetensors", MeshSpec(tp=2), "fp4")


# -- products in fp8 ------------------------------------------------------------------------------------------------------


def weight_of(rows: int, columns: int, seed: int, *scales: float) -> QuantizedWeight:
    data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(E4M3)
    return QuantizedWeight(
        [Part(ScaledFP8(), (data, *map(torch.tensor, scales)), (0, rows))], data.shape, torch.float32
    )


@pytest.mark.parametrize("scales", [(), (0.5,), (0.5, 0.25)])
def test_what_comes_in_is_rounded_to_fp8_too(scales: tuple[float, ...]) -> None:
    weights = [weight_of(rows, 32, rows, *scales) for rows in (48, 16)]
    both, bias = joined(weights), torch.randn(64)
    x = torch.randn(2, 5, 32) * 3
    scale, incoming = (*scales, 1.0, 1.0)[:2]
    x[0, 0, 0] = 1e4  # which fp8 has no number for
    rounded = (x / incoming).clamp(-448, 448).to(E4M3).float() * incoming
    data = torch.cat([weight.parts[0].tensors[0].float() for weight in weights]) * scale
    expected = F.linear(rounded, data, bias)
    plain = F.linear(x, both, bias)
    assert multiply_in_fp8(both, bare=not scales)
    torch.testing.assert_close(F.linear(x, both, bias), expected, rtol=1e-5, atol=1e-4)
    assert (plain - expected).abs().max() > 0.01
    up, down = torch.randn(16, 3), torch.randn(3, 32)
    both.wear([Product(slice(48, 64), up, down, 0.5)])
    expected[..., 48:] += 0.5 * x @ down.T @ up.T
    torch.testing.assert_close(F.linear(x, both, bias), expected, rtol=1e-4, atol=1e-2)


def test_a_lora_beside_products_in_fp8_does_not_overflow_float16() -> None:
    weight = weight_of(16, 4096, 1, 0.01).placed(lambda tensor, _: tensor, torch.float16)
    assert multiply_in_fp8(weight, bare=False)
    up, down = torch.full((16, 4), 1e-3).half(), torch.full((4, 4096), 0.5).half()
    x = torch.full((2, 4096), 50.0).half()
    plain = F.linear(x, weight)
    weight.wear([Product(slice(0, 16), up, down, 0.1)])
    torch.testing.assert_close(F.linear(x, weight), plain + 0.1 * 4 * 1e-3 * 0.5 * 50 * 4096, rtol=0.01, atol=0.5)


def test_sliced_blocks_are_multiplied_as_they_are_gathered(backend4: Backend, folder: Path) -> None:
    path, settings = folder / "unet.safetensors", {"fast_fp8": True, "has_fp8": True}
    model = backend4.load_model(path, SLICED, "float8_e4m3fn", **settings)
    plain = backend4.load_model(path, SLICED, "float8_e4m3fn")
    assert not any("products" in note for note in model.loaded.notes)
    assert torch.equal(drawn(model), drawn(plain))


def test_some_products_are_of_values_all_the_same() -> None:
    told = QuantizedWeight(
        [Part(ScaledFP8(in_full=True), weight_of(32, 32, 1, 0.5).parts[0].tensors, (0, 32))], (32, 32), torch.float32
    )
    of_rows = weight_of(32, 32, 1, 0.5)
    data = of_rows.parts[0].tensors[0]
    of_rows.parts = (Part(ScaledFP8(), (data, torch.ones(32)), (0, 32)),)
    other = QuantizedWeight(
        [Part(ScaledFP8(), (data.float().to(torch.float8_e5m2), torch.tensor(0.5)), (0, 32))], (32, 32), torch.float32
    )
    for weight in (told, of_rows, other, weight_of(24, 32, 1, 0.5), weight_of(32, 24, 1, 0.5), weight_of(32, 32, 1)):
        assert not multiply_in_fp8(weight, bare=False)
    assert not multiply_in_fp8(joined([weight_of(32, 32, 1, 0.5), torch.zeros(16, 32)]), bare=False)
    assert not multiply_in_fp8(torch.zeros(16, 32), bare=True)


@pytest.mark.parametrize(
    ("name", "fast", "multiplies"),
    [("scaled", False, True), ("bare", True, True), ("bare", False, False), ("in_full", True, False)],
)
def test_ranks_make_products_in_fp8_where_the_file_and_the_card_allow(
    name: str, fast: bool, multiplies: bool, backend4: Backend, folder: Path
) -> None:
    path = folder / f"{name}.safetensors"
    plain = drawn(backend4.load_model(path, TP, "float32"))
    pictures = []
    for mesh in (TP, PP, ULYSSES):
        model = backend4.load_model(path, mesh, "float32", fast_fp8=fast, has_fp8=True)
        assert any("are made in fp8" in note for note in model.loaded.notes) == multiplies
        pictures.append(drawn(model))
    effect = apart(pictures[0], plain)
    assert (0.005 < effect < 0.1) if multiplies else effect < 1e-5
    # A difference in the last bit of what comes in can grow to one of fp8's; one layer is equal, see above.
    assert all(apart(picture, pictures[0]) <= 0.8 * effect + 1e-5 for picture in pictures)


def apart(picture: Tensor, other: Tensor) -> float:
    return float((picture - other).std() / other.std())
