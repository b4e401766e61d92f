"""Quantised files without ComfyUI: cut anywhere they are the same weights, ranks hold what is promised, and bad files are named."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantised_files import BITSANDBYTES, GGUF, SAFETENSORS, bare_fp8, scaled_fp8, write_gguf, write_quantised
from safetensors.torch import load_file, save_file
from test_checkpoint import CPU, UNREAD, mesh_position
from torch import Tensor, nn

from parallel_backend.checkpoint_files.diffusion_part import diffusion_bytes, diffusion_entries
from parallel_backend.distributed.tensor_parallel import Shard
from parallel_backend.errors import BackendError, CheckpointError, ConfigError, UnsupportedError
from parallel_backend.models.checkpoint import bytes_held, load_parameters
from parallel_backend.models.compiled import refuse_quantised
from parallel_backend.models.mmdit import MMDiT
from parallel_backend.models.mmdit_checkpoint import PositionTable, mmdit_config, open_mmdit
from parallel_backend.models.opened_file import open_source
from parallel_backend.models.unet_checkpoint import open_unet
from parallel_backend.quantized.bitsandbytes import package
from parallel_backend.quantized.weight import QuantizedWeight
from parallel_backend.quantized.whole_file import WholeFile
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.unet import small_unet_config, unet_tensors

FORMS = [*SAFETENSORS, *BITSANDBYTES, *GGUF]
# What a lying header has in place of what a true one says.
EDITS = [
    *(("F8_E4M3", "F32"), ("U8", "F16"), ("I8", "BOOL"), ("F32", "F64"), ("F32", "I8"), ("F32", "F8_E5M2")),
    *(("256", "128"), ("16", "0"), ("16", "17"), ("[16,256]", "[]"), ("[16,256]", "[4096]"), ("shape", "shapes")),
    *(
        ("weight_scale", "weight_scales"),
        ("scale_weight", "scale"),
        ("weight", "bias"),
        ("comfy_quant", "weight_scale"),
    ),
    *(
        ("absmax", "nested_absmax"),
        ("quant_map", "absmax"),
        ("__nf4", "__fp4"),
        ("[256,1]", "[2048,1]"),
        ("[16]", "[256]"),
    ),
    *(("scaled_fp8", "scaled"), ("dtype", "type"), ("data_offsets", "offsets"), ("[", "[-1,"), ("{", "[")),
]
FC1 = "joint_blocks.0.x_block.mlp.fc1.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return load_file(write_mmdit(tmp_path_factory.mktemp("dense") / "m.safetensors", small_config("sd3.5-medium", 4)))


@pytest.fixture(scope="module")
def files(dense: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    return {form: write_quantised(folder, dense, form) for form in FORMS}


def loaded(path: Path, **coordinates: tuple[int, int]) -> dict[str, Tensor]:
    """Values of the parameters that the rank at that place holds."""
    return {name: values_of(weight) for name, weight in parameters(path, **coordinates).items()}


def parameters(path: Path, **coordinates: tuple[int, int]) -> dict[str, nn.Parameter]:
    source = open_mmdit(path)
    with torch.device("meta"):
        model = MMDiT(mmdit_config(source), mesh_position(**coordinates), "native")
    unread = frozenset(UNREAD | set(filter(model.is_elsewhere, source.names())))
    load_parameters(model, source, device=CPU, dtype=torch.float32, unread=unread)
    return dict(model.named_parameters())


def values_of(weight: Tensor) -> Tensor:
    return weight.dequantized() if isinstance(weight, QuantizedWeight) else weight


def joined_ranks(name: str, parts: list[Tensor]) -> Tensor:
    """The whole of what tp ranks hold of it."""
    if name.endswith("qkv.weight"):
        return torch.cat([torch.cat([part.chunk(3)[i] for part in parts]) for i in range(3)])
    return torch.cat(parts, dim=1 if name.endswith(("proj.weight", "fc2.weight")) else 0)


@pytest.mark.parametrize("form", FORMS)
def test_slices_of_ranks_join_to_the_whole_bit_for_bit(form: str, files: dict[str, Path]) -> None:
    whole, values = loaded(files[form]), WholeFile(files[form])
    assert set(values) == {*whole, "pos_embed"}
    for name, weight in whole.items():
        assert torch.equal(weight, values[name].float().view(weight.shape)), name
    stages = [loaded(files[form], pp=(rank, 2)) for rank in range(2)]
    assert all(torch.equal(weight, whole[name]) for stage in stages for name, weight in stage.items())
    for degree in (2, 3, 4):
        ranks = [loaded(files[form], tp=(rank, degree)) for rank in range(degree)]
        cut = [n for n in whole if n.startswith("joint_blocks.1.") and ranks[0][n].shape != whole[n].shape]
        assert cut
        for name in (name for name in cut if name.endswith("weight")):
            assert torch.equal(joined_ranks(name, [rank[name] for rank in ranks]), whole[name]), name


@pytest.mark.parametrize(
    ("form", "most"),
    [
        ("scaled fp8", 0.55),
        ("bare fp8", 0.55),
        ("nvfp4", 0.35),
        ("Q8_0", 0.55),
        ("Q4_K", 0.35),
        ("nf4, double", 0.3),
        ("nf4, blocks of 512", 0.3),
    ],
)
@pytest.mark.parametrize("degree", [1, 2])
def test_a_rank_holds_so_much_of_half_precision(form: str, most: float, degree: int, files: dict[str, Path]) -> None:
    weights = parameters(files[form], tp=(0, degree))
    matrices = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    held = sum(weight.held_bytes for weight in matrices.values())
    in_half = sum(2 * weight.numel() for weight in matrices.values())
    print(f"{form}, rank 1 of {degree}: {held / in_half:.3f} of half precision")
    assert held <= most * in_half
    source = open_mmdit(files[form])
    with torch.device("meta"):
        model = MMDiT(mmdit_config(source), mesh_position(tp=(0, degree)), "native")
    told = bytes_held(model, source, torch.float16)
    rest = sum(2 * weight.numel() for name, weight in weights.items() if name not in matrices)
    assert told == pytest.approx(held + rest, rel=0.02)
    read = source.bytes_read
    load_parameters(model, source, device=CPU, dtype=torch.float32, unread=UNREAD)
    # Of bitsandbytes' bytes the columns of a rank can't be read alone.
    assert source.bytes_read - read <= (1.1 if form in BITSANDBYTES else 1.02) * (held + 2 * rest)


@pytest.mark.parametrize("form", ["bare fp8", "Q4_0", "scaled fp8"])
def test_the_position_table_is_read_from_such_a_file(
    form: str, files: dict[str, Path], dense: dict[str, Tensor]
) -> None:
    rows = PositionTable(open_mmdit(files[form]), 64, CPU, torch.float32).rows(3, 5, [(0, 15)])
    table = dense["pos_embed"].view(64, 64, -1)[30:33, 29:34].reshape(15, -1)
    torch.testing.assert_close(rows, table, atol=0.07, rtol=0)


def test_folded_kernels_of_gguf_files_are_cut_inside_of_blocks(tmp_path: Path) -> None:
    tensors = unet_tensors(small_unet_config((256, 256, 512)), "single file")
    path = write_gguf(tmp_path / "unet.gguf", tensors, "Q4_K", "sdxl")
    source, whole = open_source(path), WholeFile(path)
    kernel = "input_blocks.1.0.in_layers.2.weight"
    assert source.shape(kernel) == tensors[kernel].shape == (256, 256, 3, 3)
    for cuts in ([0, 256], [0, 85, 171, 256]):
        parts = [values_of(source.read(kernel, Shard(0, (span,)))) for span in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole[kernel])
    opened, config = open_unet(path)
    assert config == small_unet_config((256, 256, 512))
    joined = next(name for name in opened.names() if name.endswith("attn1.to_qkv.weight"))
    assert isinstance(opened.read(joined), QuantizedWeight)


def test_entries_and_sizes_are_told_as_of_the_values(
    files: dict[str, Path], dense: dict[str, Tensor], tmp_path: Path
) -> None:
    for form in FORMS:
        shapes = {name: tuple(entry["shape"]) for name, entry in diffusion_entries(files[form]).items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in dense.items()}, form
    half = sum(2 * tensor.numel() for tensor in dense.values())
    assert diffusion_bytes(files["bare fp8"], 2) * 2 == half
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in scaled_fp8(dense).items()}
    encoder = {"text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    save_file(whole | encoder, tmp_path / "whole.safetensors")
    assert diffusion_bytes(tmp_path / "whole.safetensors", 2) == diffusion_bytes(files["scaled fp8"], 2)
    assert torch.equal(loaded(tmp_path / "whole.safetensors")[FC1], loaded(files["scaled fp8"])[FC1])


def test_metadata_can_say_for_all_layers_how_they_are_quantised(dense: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {}
    for name, tensor in scaled_fp8(dense).items():
        if not name.endswith(("scale_input", "scaled_fp8")):
            tensors[name.replace("scale_weight", "weight_scale")] = tensor
    layers = {name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for name in tensors if "_scale" in name}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})
    scaled = loaded(write_quantised(tmp_path, dense, "scaled fp8"))
    assert all(torch.equal(weight, scaled[name]) for name, weight in loaded(path).items())


def test_compiling_is_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"Q8_0\.gguf is quantised or to be held in fp8, and compile"):
        refuse_quantised(open_mmdit(files["Q8_0"]))


def edited(dense: dict[str, Tensor], tmp_path: Path, form: str = "fp8 with scales", **changes: Any) -> Path:
    """A file of that form with some tensors beside a weight of another value; None leaves one out."""
    tensors = {**SAFETENSORS, **BITSANDBYTES}[form](dense)
    for leaf, value in changes.items():
        name = f"{FC1.removesuffix('weight')}{leaf}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


ROTATED = '{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": %s}'


def text(words: str) -> Tensor:
    return torch.tensor(list(words.encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [1024, 256]}'
NESTED = NF4.replace("}", ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": %s}')


@pytest.mark.parametrize(
    ("form", "changes", "error", "words"),
    [
        (
            "fp8 with scales",
            {"weight_scale": torch.ones(7)},
            CheckpointError,
            r"fc1\.weight has shape \[7\], its values",
        ),
        ("nvfp4", {"weight_scale": torch.ones(8, 8).to(torch.float8_e4m3fn)}, CheckpointError, r"has shape \[8, 8\]"),
        ("nvfp4", {"weight_scale_2": None}, CheckpointError, r"lacks .*fc1\.weight_scale_2"),
        (
            "int8",
            {"weight": torch.zeros(1024, 256)},
            CheckpointError,
            r"is to be int8_tensorwise, and is F32 of shape \[1024, 256\]",
        ),
        ("int8", {"comfy_quant": text(ROTATED % '"x"')}, CheckpointError, "groups of 'x' .* don't divide"),
        (
            "int8",
            {"comfy_quant": text(ROTATED % 100)},
            CheckpointError,
            "256 columns, which groups of 100 .* don't divide",
        ),
        ("int8", {"weight_scale": None}, CheckpointError, r"lacks .*fc1\.weight_scale"),
        ("int8", {"comfy_quant": text('{"format": "int3"}')}, UnsupportedError, "fc1 is quantised as 'int3'"),
        ("int8", {"comfy_quant": text("{")}, CheckpointError, "says in no readable way how it is quantised"),
        ("int8", {"comfy_quant": text("[1]")}, CheckpointError, "says in no readable way how it is quantised"),
        ("nvfp4", {"pre_quant_scale": torch.ones(256)}, UnsupportedError, "scales what comes into .*fc1"),
        ("nf4", {STATE: text("{")}, CheckpointError, r"fc1\.weight says in no readable way how bitsandbytes"),
        ("nf4", {STATE: text("[]")}, CheckpointError, "says in no readable way how bitsandbytes"),
        ("nf4", {STATE: text(NF4.replace("64", "0"))}, CheckpointError, "says in no readable way how bitsandbytes"),
        ("nf4", {STATE: text(NF4.replace("1024", "-1024"))}, CheckpointError, "says in no readable way"),
        ("nf4", {STATE: text(NF4.replace("256", "128"))}, CheckpointError, r"fc1\.weight is U8 .* has 65536 of U8"),
        ("nf4", {STATE: text(NF4.replace("64", "128"))}, CheckpointError, r"absmax is F32 .* has 2048 of F32"),
        ("nf4", {"weight.absmax": torch.ones(7)}, CheckpointError, r"absmax is F32 of shape \[7\], where"),
        ("nf4", {"weight.quant_map": None}, CheckpointError, r"lacks .*fc1\.weight\.quant_map"),
        ("nf4, double", {"weight.nested_absmax": None}, CheckpointError, r"lacks .*fc1\.weight\.nested_absmax"),
        ("nf4, double", {"weight.nested_absmax": torch.ones(99)}, CheckpointError, "has 16 of F32"),
        ("nf4", {"weight.absmax": torch.ones(1, 4096)}, CheckpointError, r"absmax is F32 of shape \[1, 4096\]"),
        (
            "nf4",
            {"weight": torch.zeros(1, 131072, dtype=torch.uint8)},
            CheckpointError,
            r"is U8 of shape \[1, 131072\]",
        ),
        ("nf4, double", {STATE: text(NESTED % "NaN")}, CheckpointError, "says in no readable way how bitsandbytes"),
        ("nf4, double", {STATE: text(NESTED % 10**400)}, CheckpointError, "says in no readable way"),
        (
            "nf4, double",
            {STATE: text((NESTED % 0).replace("float32", "float16"))},
            CheckpointError,
            "says in no readable way",
        ),
        ("nf4", {"weight.quant_map": torch.ones(4, 4)}, CheckpointError, r"quant_map is F32 of shape \[4, 4\]"),
        ("nf4", {STATE: text(NF4.replace("1024, 256", "1024, 64, 2, 2"))}, CheckpointError, "says in no readable way"),
        ("nf4", {STATE: text("[" * 200_000)}, CheckpointError, "says in no readable way how bitsandbytes"),
        ("int8", {"comfy_quant": text("[" * 200_000)}, CheckpointError, "says in no readable way how it is quantised"),
        ("nf4", {"weight": torch.zeros(65536, 1, dtype=torch.bfloat16)}, UnsupportedError, "packed .*weight in BF16"),
    ],
)
def test_a_bad_scale_or_an_unknown_form_is_named(
    form: str, changes: dict[str, Any], error: type[BackendError], words: str, dense: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        open_mmdit(edited(dense, tmp_path, form, **changes))


@pytest.mark.parametrize("form", BITSANDBYTES)
def test_values_are_those_that_bitsandbytes_gives(form: str, files: dict[str, Path]) -> None:
    import bitsandbytes.functional as bnb

    stored, values = load_file(files[form]), WholeFile(files[form])
    parts = {name.removeprefix(f"{FC1}."): tensor for name, tensor in stored.items() if name.startswith(f"{FC1}.")}
    state, two = bnb.QuantState.from_dict(parts, device=CPU), stored[FC1].flatten()
    largest = state.absmax
    if state.nested:
        largest = bnb.dequantize_blockwise(largest, state.state2) + state.offset
    each = state.code[torch.stack([two >> 4, two & 15], 1).flatten().long()].view(-1, state.blocksize)
    expected = (each * largest[:, None]).view(1024, 256).to(torch.bfloat16).float()
    assert torch.equal(values[FC1], expected)
    if state.blocksize <= 256:  # its kernel for CPUs takes blocks to end with rows
        assert torch.equal(expected, bnb.dequantize_4bit(stored[FC1], state).float())


@pytest.mark.parametrize("shape", [(40, 100), (7, 36), (9, 1024)])
def test_rows_and_columns_anywhere_in_bitsandbytes_blocks(shape: tuple[int, int], tmp_path: Path) -> None:
    tensors = {FC1: torch.randn(*shape, generator=torch.Generator().manual_seed(1))}
    for form in BITSANDBYTES:
        path = write_quantised(tmp_path, tensors, form)
        source, whole = open_source(path), WholeFile(path)[FC1]
        assert source.shape(FC1) == shape and (whole - tensors[FC1]).abs().max() < 1
        for dim, cuts in enumerate(((0, 3, 5, shape[0]), (0, 9, 20, shape[1]))):
            shards = [Shard(dim, (span,)) for span in pairwise(cuts)]
            parts = [source.read(FC1, shard) for shard in shards]
            assert torch.equal(torch.cat([values_of(part) for part in parts], dim), whole)
            for part, shard in zip(parts, shards, strict=True):
                told = source.held_bytes(FC1, shard)
                assert isinstance(part, QuantizedWeight) and told is not None
                of_table, block = 64, 512  # the last block of a file may be shorter
                assert told - block // 2 <= part.held_bytes - of_table <= told


def test_such_a_file_needs_the_package_and_says_so(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    package.cache_clear()
    with pytest.raises(UnsupportedError, match="bitsandbytes, which is not installed") as refused:
        open_mmdit(files["nf4"])  # before room is made for it
    assert "pip install bitsandbytes" in str(refused.value) + str(vars(refused.value))
    monkeypatch.undo()
    assert open_mmdit(files["nf4"]).read(FC1).shape == (1024, 256)


def test_a_truncated_gguf_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    whole = files["Q8_0"].read_bytes()
    for length in (0, 3, 30, 2000, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is no whole GGUF file"):
            open_source(tmp_path / "cut.gguf")


def read_or_named(path: Path) -> None:
    """All of the file is read, or a named error tells why not; any other error would end a rank."""
    with suppress(BackendError):
        source = open_source(path)
        for name in source.names():
            values_of(source.read(name))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, 3000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_header_that_lies_ends_in_a_named_error(
    changes: list[tuple[int, int]], tiny_gguf: bytes, tmp_path: Path
) -> None:
    lying = bytearray(tiny_gguf)
    for place, value in changes:
        lying[place % len(lying)] = value
    path = tmp_path / "lying.gguf"
    path.write_bytes(lying)
    read_or_named(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from([*SAFETENSORS, *BITSANDBYTES]),
    edits=st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(EDITS)), min_size=1, max_size=4),
)
def test_a_quantised_header_that_lies_ends_in_a_named_error(
    form: str, edits: list[tuple[int, tuple[str, str]]], tiny_files: dict[str, bytes], tmp_path: Path
) -> None:
    whole = tiny_files[form]
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].decode().rstrip()
    for place, (old, new) in edits:
        found = [i for i in range(len(header)) if header.startswith(old, i)]
        if found:
            at = found[place % len(found)]
            header = header[:at] + new + header[at + len(old) :]
    path = tmp_path / "lying.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + whole[8 + length :])
    read_or_named(path)


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    tensors = {f"joint_blocks.{i}.x_block.mlp.fc1.weight": torch.ones(16, 256) for i in range(3)}
    folder = tmp_path_factory.mktemp("tiny_files")
    return {form: write_quantised(folder, tensors, form).read_bytes() for form in [*SAFETENSORS, *BITSANDBYTES]}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors = {f"joint_blocks.{i}.x_block.mlp.fc1.weight": torch.ones(4, 256) for i in range(20)}
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tensors, "Q8_0").read_bytes()


def test_bare_fp8_files_may_have_any_tensor_in_fp8(dense: dict[str, Tensor], files: dict[str, Path]) -> None:
    values = loaded(files["bare fp8"])
    assert all(torch.equal(weight, bare_fp8(dense)[name].float()) for name, weight in values.items())
