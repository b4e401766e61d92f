"""Checkpoint files: layouts, slices, strictness, and what is said of a bad one."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from reference_models import diffusers_mmdit
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.checkpoint_files.diffusion_part import FROM_SCRATCH_MARK, diffusion_bytes, is_from_scratch
from parallel_backend.config import AXES
from parallel_backend.distributed.mesh import Mesh, MeshAxis
from parallel_backend.distributed.tensor_parallel import Shard
from parallel_backend.errors import CheckpointError, UnsupportedError
from parallel_backend.models.checkpoint import load_parameters
from parallel_backend.models.mmdit import MMDiT
from parallel_backend.models.mmdit_checkpoint import POS_EMBED, PositionTable, mmdit_config, open_mmdit
from parallel_backend.models.vae_checkpoint import open_vae
from parallel_backend.small_checkpoints.mmdit import FAMILIES, small_config, write_mmdit

UNREAD = frozenset({POS_EMBED})
CPU = torch.device("cpu")


def mesh_position(**coordinates: tuple[int, int]) -> Mesh:
    """A mesh seen from one place, (rank, degree) per axis, without the other ranks: enough to load slices."""
    axes = {a: MeshAxis(a, coordinates.get(a, (0, 1))[1], coordinates.get(a, (0, 1))[0]) for a in AXES}
    return Mesh(MeshSpec(**{a: axes[a].degree for a in AXES}), **axes)


def load(path: Path, mesh: Mesh | None = None, dtype: torch.dtype = torch.float32) -> tuple[MMDiT, int]:
    source = open_mmdit(path)
    with torch.device("meta"):
        model = MMDiT(mmdit_config(source), mesh or mesh_position(), "native")
    load_parameters(model, source, device=CPU, dtype=dtype, unread=UNREAD)
    return model, source.bytes_read


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_family_and_sizes_are_read_from_the_header(
    family: str, dtype: torch.dtype, prefix: str, tmp_path: Path
) -> None:
    config = small_config(family, depth=2)
    path = write_mmdit(tmp_path / "m.safetensors", config, dtype=dtype, prefix=prefix)
    assert mmdit_config(open_mmdit(path)) == config
    model, _ = load(path)
    assert next(model.parameters()).dtype == torch.float32


def test_a_full_checkpoint_gives_its_diffusion_model_and_its_vae(tmp_path: Path) -> None:
    from parallel_backend.small_checkpoints.kl_vae import write_kl_vae

    parts = [
        write_mmdit(tmp_path / "m.safetensors", small_config("sd3.5-large", 2), prefix="model.diffusion_model."),
        write_kl_vae(tmp_path / "v.safetensors", latent_channels=16, quant=False, prefix="first_stage_model."),
    ]
    save_file({**load_file(parts[0]), **load_file(parts[1])}, tmp_path / "full.safetensors")
    load(tmp_path / "full.safetensors")
    assert open_vae([tmp_path / "full.safetensors"]).latent_channels == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_diffusers_folder_holds_the_same_weights(family: str, tmp_path: Path) -> None:
    config = small_config(family, depth=2)
    path = write_mmdit(tmp_path / "m.safetensors", config)
    reference: SD3Transformer2DModel = diffusers_mmdit(config, load_file(path))
    reference.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="20MB")
    ours, theirs = open_mmdit(path), open_mmdit(tmp_path / "pipeline")
    assert mmdit_config(theirs) == config
    assert sorted(ours.names()) == sorted(theirs.names())
    for name in ours.names():
        assert torch.equal(ours.read(name), theirs.read(name)), name
    for shard in (Shard(0, ((100, 150), (300, 420))), Shard(1, ((5, 60), (64, 70)))):
        name = "joint_blocks.0.x_block.attn.qkv.weight"
        assert torch.equal(ours.read(name, shard), theirs.read(name, shard))


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_tp_ranks_hold_slices_that_join_to_the_whole(degree: int, tmp_path: Path) -> None:
    path = write_mmdit(tmp_path / "m.safetensors", small_config("sd3.5-medium", depth=2, heads=5))
    whole = load_file(path)
    parts = [dict(load(path, mesh_position(tp=(rank, degree)))[0].named_parameters()) for rank in range(degree)]
    sizes = torch.zeros(degree)
    for name, full in whole.items():
        if name == POS_EMBED:
            continue
        local = [part[name] for part in parts]
        sizes += torch.tensor([float(p.numel()) for p in local])
        if all(p.shape == full.shape for p in local):
            assert all(torch.equal(p, full) for p in local)
            continue
        dim = next(d for d in range(full.ndim) if local[0].shape[d] != full.shape[d])
        thirds = 3 if name.endswith(("qkv.weight", "qkv.bias")) else 1  # q, k and v are each cut by heads
        chunks = [p.chunk(thirds, dim) for p in local]
        joined = torch.cat([c[i] for i in range(thirds) for c in chunks], dim)
        assert torch.equal(joined, full), name


def test_a_tp2_rank_reads_at_most_52_percent_of_the_block_bytes(tmp_path: Path) -> None:
    path = write_mmdit(tmp_path / "m.safetensors", small_config("sd3.5-large", depth=6))
    blocks = sum(t.nbytes for name, t in load_file(path).items() if name.startswith("joint_blocks."))
    outside = sum(t.nbytes for n, t in load_file(path).items() if not n.startswith("joint_blocks.") and n != POS_EMBED)
    for rank in range(2):
        _, read = load(path, mesh_position(tp=(rank, 2)))
        assert read <= 0.52 * blocks + outside


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_stages_hold_their_own_blocks_and_together_the_whole(degree: int, tmp_path: Path) -> None:
    path = write_mmdit(tmp_path / "m.safetensors", small_config("sd3.5-medium", depth=5))
    whole, source = load_file(path), open_mmdit(path)
    held: dict[str, Tensor] = {}
    for rank in range(degree):
        with torch.device("meta"):
            model = MMDiT(mmdit_config(source), mesh_position(pp=(rank, degree)), "native")
        unread = UNREAD | frozenset(filter(model.is_elsewhere, source.names()))
        before = source.bytes_read
        load_parameters(model, source, device=CPU, dtype=torch.float32, unread=unread)
        own = dict(model.named_parameters())
        assert source.bytes_read - before == sum(p.nbytes for p in own.values())
        again = {name for name in held if name in own}
        assert all(name.startswith(("t_embedder.", "y_embedder.")) for name in again)
        held |= own
    assert held.keys() == whole.keys() - UNREAD
    assert all(torch.equal(held[name], whole[name]) for name in held)


def test_only_the_needed_rows_of_the_position_table_are_read(tmp_path: Path) -> None:
    path = write_mmdit(tmp_path / "m.safetensors", small_config("sd3.5-large", depth=2, pos_embed_size=64))
    full = load_file(path)[POS_EMBED].view(64, 64, -1)
    expected = full[28:35, 27:36].reshape(
        63, -1
    )  # 7 x 9 tokens in the middle: (64 - 7) // 2 rows above, (64 - 9) // 2 left
    rows = []
    for rank in range(4):
        mesh = mesh_position(ring=(rank // 2, 2), ulysses=(rank % 2, 2))
        source = open_mmdit(path)
        with torch.device("meta"):
            model = MMDiT(mmdit_config(source), mesh, "native")
        ranges = model.tokens_for(14, 18, 8).image
        rows.append(PositionTable(source, 64, CPU, torch.float32).rows(7, 9, ranges))
        assert source.bytes_read == rows[-1].nbytes
    assert torch.equal(torch.cat(rows), expected)


def damaged(path: Path, **change: object) -> Path:
    tensors = load_file(path)
    for name, value in change.items():
        key = name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value  # type: ignore[assignment]
    save_file(tensors, path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_mmdit(tmp_path / "small.safetensors", small_config("sd3.5-large", depth=2))


def test_missing_and_left_over_names_are_both_said(small: Path) -> None:
    path = damaged(small, joint_blocks__1__x_block__mlp__fc2__bias=None, surprise=torch.zeros(3))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "(1 missing; 1 left over)" in caught.value.message
    assert caught.value.details == "missing: joint_blocks.1.x_block.mlp.fc2.bias\nleft over: surprise"


def test_a_wrong_shape_is_said(small: Path) -> None:
    path = damaged(small, joint_blocks__1__x_block__mlp__fc2__bias=torch.zeros(64))
    with pytest.raises(CheckpointError, match=r"fc2.bias has shape \[64\], the model needs \[128\]"):
        load(path)


def test_a_truncated_file_is_said(small: Path) -> None:
    data = small.read_bytes()
    small.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"has {len(data) // 2} bytes where its header promises {len(data)}"):
        load(small)


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), b"PK\x03\x04" + b"\0" * 100], ids=["pickle", "zip"])
def test_a_pickle_under_another_name_is_never_opened(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="it is a pickle"):
        open_mmdit(path)
    with pytest.raises(CheckpointError, match="it is a pickle"):
        content_key(path)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 64, (10).to_bytes(8, "little") + b'{"a": 12}  '])
def test_what_is_no_safetensors_file_is_said(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="should be a safetensors file"):
        open_mmdit(path)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("input_blocks.0.0.weight", "a UNet"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a UNet"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("decoder.conv_in.weight", "a VAE"),
        ("something.else", "something this version doesn't know"),
    ],
)
def test_another_family_is_named(name: str, family: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"other.safetensors is {family}.*an SD3 or SD3.5 model"):
        open_mmdit(tmp_path / "other.safetensors")


def test_an_unknown_type_of_numbers_is_refused_by_name(small: Path) -> None:
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    tensors = load_file(small)
    tensors[name] = tensors[name].double()
    save_file(tensors, small)
    with pytest.raises(UnsupportedError, match="F64"):
        load(small)


def test_the_content_key_follows_the_weights(small: Path, tmp_path: Path) -> None:
    key = content_key(small)
    assert content_key(small) == key
    damaged(small, joint_blocks__1__x_block__mlp__fc2__bias=torch.ones(128))
    assert content_key(small) != key


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no file at"):
        content_key(tmp_path / "nothing.safetensors")


def test_the_size_of_the_diffusion_model_is_known_without_the_encoders_beside_it(tmp_path: Path) -> None:
    plain = write_mmdit(tmp_path / "plain.safetensors", small_config("sd3.5-large", 2))
    parts = {"model.diffusion_model." + name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(parts | {"text_encoders.clip_l.weight": torch.zeros(1000, 1000)}, tmp_path / "whole.safetensors")
    expected = sum(tensor.numel() for tensor in load_file(plain).values())
    assert diffusion_bytes(plain, 2) == diffusion_bytes(tmp_path / "whole.safetensors", 2) == 2 * expected
    torch.save({"module." + FROM_SCRATCH_MARK: torch.zeros(1000)}, tmp_path / "scratch.pkl")
    assert diffusion_bytes(tmp_path / "scratch.pkl", 4) == 4000 and is_from_scratch(tmp_path / "scratch.pkl")
    assert not is_from_scratch(plain)
