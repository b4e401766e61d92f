"""Patches on weights: each rank's part is that of the patched whole, and the base comes back bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool, groups
from safetensors.torch import load_file, save_file
from served import sample
from torch import Tensor

from parallel_backend import Backend, MeshSpec, RemoteModel, WeightPatches
from parallel_backend.checkpoint_files.patch_file import LowRank, Whole, entries_of, write_low_rank, write_whole
from parallel_backend.config import FP8
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.errors import CheckpointError, InputError
from parallel_backend.extras.weights import SENT_FILES, PatchedWeights, PatchFiles
from parallel_backend.models.checkpoint import SafetensorsSource, load_parameters
from parallel_backend.models.families import open_model
from parallel_backend.quantized.weight import QuantizedWeight
from parallel_backend.rpc.messages import Patches
from parallel_backend.rpc.runtime_dir import patches_folder
from parallel_backend.small_checkpoints.prompts import random_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet

CPU = torch.device("cpu")
QKV, PROJ = "joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.1.context_block.attn.proj.weight"
ATTENTION = "input_blocks.5.1.transformer_blocks.0."


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def low_rank(weight: str, shape: tuple[int, ...], seed: int, row: int = 0, rows: int = 0, rank: int = 3) -> LowRank:
    kernel = shape[2:]
    up = noise(rows or shape[0], rank, *[1] * len(kernel), seed=seed)
    return LowRank(weight, up, noise(rank, *shape[1:], seed=seed + 1), row)


def some_patches(shapes: dict[str, tuple[int, ...]]) -> tuple[list[LowRank], list[Whole]]:
    """On matrices, kernels, biases and tables: low-rank ones, two on one matrix, on some of its rows, and whole ones."""
    matrices = [name for name, shape in shapes.items() if len(shape) in (2, 4) and min(shape[:2]) > 3]
    vectors = [name for name, shape in shapes.items() if len(shape) == 1]
    low, whole = [], []
    for seed, name in enumerate(matrices):
        shape = shapes[name]
        if seed % 3 == 0:
            whole.append(Whole(name, shape, torch.float32, lambda shape=shape, seed=seed: noise(*shape, seed=seed)))  # type: ignore[misc]
            continue
        low.append(low_rank(name, shape, seed))
        low.append(low_rank(name, shape, seed + 50, row=shape[0] // 3, rows=shape[0] // 2, rank=5))
    whole += [
        Whole(name, shapes[name], torch.float32, lambda n=name: noise(*shapes[n], seed=9)) for name in vectors[::2]
    ]  # type: ignore[misc]
    return low, whole


def patched(base: dict[str, Tensor], low: list[LowRank], scales: list[float], whole: list[Whole]) -> dict[str, Tensor]:
    """The same by plain arithmetic on whole tensors."""
    full = {name: tensor.clone() for name, tensor in base.items()}
    for patch, scale in zip(low, scales, strict=True):
        product = patch.up.flatten(1).double() @ patch.down.flatten(1).double() * scale
        full[patch.weight][patch.row : patch.row + len(product)] += product.view(-1, *patch.down.shape[1:]).float()
    return full | {patch.weight: patch.make() for patch in whole}


def rank_case(path: Path, spec: MeshSpec, folder: Path, patches: Patches, other: Path) -> list[float]:
    """How far this rank's parts are from those of `other`, a file of the patched tensors, and from the base after all."""
    mesh = build_mesh(spec, groups()) if spec.world_size > 1 else build_mesh(spec)
    opened, expected = open_model(path), open_model(other)
    with torch.device("meta"):
        model = opened.build(mesh, "native")
    settings = {"device": CPU, "dtype": torch.float32, "unread": opened.unread(model)}
    held = load_parameters(model, opened.source, **settings)  # type: ignore[arg-type]
    network = opened.network(model, mesh, "native", CPU, torch.float32)
    weights = PatchedWeights(held, opened.source, opened.place, opened.later(network))
    files, base = PatchFiles(folder), {name: weight.parameter.clone() for name, weight in held.items()}
    swap = weights.wear(patches, files)
    far = [
        float((weight.parameter - expected.source.read(name, weight.shard)).abs().max())
        for name, weight in held.items()
    ]
    changed = sum(not torch.equal(weight.parameter, base[name]) for name, weight in held.items())
    assert 0 < changed <= swap.weights and swap.bytes_read < sum(w.parameter.nbytes for w in held.values())
    assert weights.wear(patches, files).weights == 0
    weights.wear(Patches(), files)
    return [max(far), float(all(torch.equal(weight.parameter, base[name]) for name, weight in held.items()))]


@pytest.mark.parametrize(
    ("file", "spec"),
    [
        ("sd3.5-medium", MeshSpec(tp=2)),
        ("sd3.5-large", MeshSpec(pp=2)),
        ("sd3-medium", MeshSpec(tp=3)),
        ("sd3-medium", MeshSpec(tp=2, pp=2)),
        ("unet-tiny", MeshSpec()),
        ("unet-refiner", MeshSpec(cfg=2, patch=2, sliced=True)),
        ("unet-tiny diffusers", MeshSpec(patch=3, sliced=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_every_rank_has_its_part_of_the_patched_weights_and_of_the_base_again(
    file: str, spec: MeshSpec, ranks: RankPool, unets: Path, tmp_path: Path
) -> None:
    path = unets / f"{file.split()[0]}.safetensors"
    base = load_file(path)
    low, whole = some_patches({name: tuple(tensor.shape) for name, tensor in base.items() if name != "pos_embed"})
    scales = [0.7 if number % 2 else -1.3 for number in range(len(low))]
    other = tmp_path / "patched.safetensors"
    save_file({n: t.contiguous() for n, t in patched(base, low, scales, whole).items()}, other)
    if file.endswith("diffusers"):
        path = tmp_path / "diffusers.safetensors"
        write_unet(path, CONFIGS["tiny"], "diffusers")
    patches = Patches(write_low_rank(tmp_path, low), scales, write_whole(tmp_path, whole))
    for far, restored in ranks(spec.world_size, rank_case, path, spec, tmp_path, patches, other):
        assert far < 2e-5 and restored


def test_only_those_weights_change_whose_patches_do(large: Path, tmp_path: Path) -> None:
    opened = open_model(large)
    with torch.device("meta"):
        model = opened.build(build_mesh(MeshSpec()), "native")
    held = load_parameters(model, opened.source, device=CPU, dtype=torch.float16, unread=opened.unread(model))
    weights, files = PatchedWeights(held, opened.source, opened.place, {}), PatchFiles(tmp_path)
    one, two = low_rank(QKV, (768, 256), 1), low_rank(PROJ, (256, 256), 2)
    both, first = write_low_rank(tmp_path, [one, two]), write_low_rank(tmp_path, [one])
    counts = [
        weights.wear(Patches(name, scales), files).weights
        for name, scales in [(first, [1.0]), (both, [1.0, 0.5]), (both, [1.0, 0.7]), (first, [1.0]), ("", [])]
    ]
    assert counts == [1, 1, 1, 1, 1]


def test_patches_of_another_size_and_files_that_are_none_are_named_and_the_weights_stay(
    large: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(large.read_bytes())
    opened = open_model(copy)
    with torch.device("meta"):
        model = opened.build(build_mesh(MeshSpec()), "native")
    held = load_parameters(model, opened.source, device=CPU, dtype=torch.float32, unread=opened.unread(model))
    weights, files = PatchedWeights(held, opened.source, opened.place, {}), PatchFiles(tmp_path)
    base = held[QKV].parameter.clone()
    wide = write_low_rank(tmp_path, [low_rank(QKV, (768, 300), 1)])
    with pytest.raises(InputError, match=r"patch on joint_blocks\.0\.x_block\.attn\.qkv\.weight has 768 x 300"):
        weights.wear(Patches(wide, [1.0]), files)
    with pytest.raises(InputError, match="2 scales for 1 patches"):
        weights.wear(Patches(wide, [1.0, 1.0]), files)
    other = write_low_rank(tmp_path, [low_rank("joint_blocks.9.nothing", (256, 256), 1)])
    with pytest.raises(InputError, match=r"copy.safetensors has no weight joint_blocks\.9\.nothing"):
        weights.wear(Patches(other, [1.0]), files)
    with pytest.raises(InputError, match="no name of a patch file"):
        weights.wear(Patches("../secret.safetensors", [1.0]), files)
    cut = tmp_path / write_low_rank(tmp_path, [low_rank(QKV, (768, 256), 1)])
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        weights.wear(Patches(cut.name, [1.0]), files)
    cut.write_bytes(whole)
    copy.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        weights.wear(Patches(cut.name, [1.0]), files)
    assert torch.equal(held[QKV].parameter, base)


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_patch_that_does_not_fit_leaves_the_former_ones_on_a_quantised_weight(
    is_whole: bool, large: Path, tmp_path: Path
) -> None:
    opened = open_model(large, weights=FP8)
    with torch.device("meta"):
        model = opened.build(build_mesh(MeshSpec()), "native")
    held = load_parameters(model, opened.source, device=CPU, dtype=torch.float32, unread=opened.unread(model))
    weights, files = PatchedWeights(held, opened.source, opened.place, {}), PatchFiles(tmp_path)
    weight = held[QKV].parameter
    assert isinstance(weight, QuantizedWeight)
    fits = Patches(write_low_rank(tmp_path, [low_rank(QKV, (768, 256), 1)]), [1.0])
    if is_whole:
        other = Whole(QKV, (768, 300), torch.float32, lambda: noise(768, 300, seed=1))
        name = write_whole(tmp_path, [other])
        wide = Patches(whole=name)
    else:
        wide = Patches(write_low_rank(tmp_path, [low_rank(QKV, (768, 300), 1)]), [1.0])
    base = weight.dequantized()
    weights.wear(fits, files)
    patched_, moved = weight.dequantized(), weights.moved
    assert not torch.equal(patched_, base)
    with pytest.raises(InputError, match="has 768 x 300"):
        weights.wear(wide, files)
    weights.wear(fits, files)
    assert torch.equal(weight.dequantized(), patched_) and weights.moved > moved
    weights.wear(Patches(), files)
    assert torch.equal(weight.dequantized(), base)


def test_a_patch_file_is_named_by_its_content_and_holds_no_factor(tmp_path: Path) -> None:
    one, again, other = (low_rank(QKV, (768, 256), seed) for seed in (1, 1, 2))
    names = [write_low_rank(tmp_path, [patch]) for patch in (one, again, other)]
    assert names[0] == names[1] != names[2]
    (entry,) = entries_of(tmp_path / names[0])
    assert (entry.weight, entry.row) == (QKV, 0)
    assert [path.name for path in sorted(tmp_path.iterdir())] == sorted(set(names))


def test_a_host_keeps_the_last_few_of_the_files_that_it_was_sent(tmp_path: Path) -> None:
    names = [write_low_rank(tmp_path / "client", [low_rank(PROJ, (256, 256), seed)]) for seed in range(SENT_FILES + 2)]
    files = PatchFiles(tmp_path / "host")
    for name in [*names, names[-2]]:
        data = torch.frombuffer(bytearray((tmp_path / "client" / name).read_bytes()), dtype=torch.uint8)
        files.add(name, 0, data[:1000], last=False)
        files.add(name, 1, data[1000:], last=True)
    assert sorted(path.name for path in (tmp_path / "host").iterdir()) == sorted(names[-SENT_FILES:])
    assert files.opened(names[-1])[0][0].weight == PROJ


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    source = SafetensorsSource(path)
    return {name: source.shape(name) for name in source.names()}


@pytest.fixture
def patches(large: Path) -> WeightPatches:
    low = [low_rank(QKV, shapes_of(large)[QKV], 1), low_rank(PROJ, shapes_of(large)[PROJ], 2)]
    shape = shapes_of(large)["pos_embed"]
    table = Whole("pos_embed", shape, torch.float16, lambda: noise(*shape, seed=4))
    return WeightPatches([(patch, 0.8) for patch in low], [table])


def test_jobs_name_base_and_patches_and_two_clients_get_their_own(
    model: RemoteModel, patches: WeightPatches, expected: Tensor, backend2: Backend, large: Path, tmp_path: Path
) -> None:
    base = load_file(large)
    both = [low_rank(QKV, tuple(base[QKV].shape), 1), low_rank(PROJ, tuple(base[PROJ].shape), 2)]
    table = Whole("pos_embed", (), torch.float16, lambda: noise(*base["pos_embed"].shape, seed=4).half().float())
    other = tmp_path / "other.safetensors"
    save_file({n: t.contiguous() for n, t in patched(base, both, [0.8, 0.8], [table]).items()}, other)
    wanted = sample(backend2.load_model(other, MeshSpec(cfg=2), "float32"))
    assert (wanted - expected).abs().max() > 0.01

    first, second = Backend.attach(backend2.spec.name), Backend.attach(backend2.spec.name)
    models = [b.load_model(large, MeshSpec(cfg=2), "float32") for b in (first, second)]
    for _ in range(2):
        torch.testing.assert_close(sample(models[0], patches=patches), wanted, rtol=1e-4, atol=1e-4)
        assert models[0].last is not None and models[0].last.swap.weights == 3
        assert backend2.status().models[-1].patched == 3
        assert torch.equal(sample(models[1]), expected)
        assert backend2.status().models[-1].patched == 0
    sample(models[0], patches=patches)
    assert models[0].last.swap.weights == 3
    sample(models[0], patches=patches)
    assert models[0].last.swap.weights == 0
    for backend in (first, second):
        backend.close()


def test_what_was_made_of_a_prompt_is_made_anew_once_weights_have_changed(model: RemoteModel, large: Path) -> None:
    """Step by step with one prompt: its text tokens, embedded by weights that a patch comes to and leaves."""
    name = "context_embedder.weight"
    patch = WeightPatches([(low_rank(name, shapes_of(large)[name], 1), 0.8)], [])
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(1, 16, 8, 8, generator=generator), torch.tensor([500.0]), *random_prompt(1, 21)
    before = model.forward(*given)
    assert torch.equal(model.forward(*given), before)
    assert (model.forward(*given, patches=patch) - before).abs().max() > 1e-3 * before.abs().max()
    assert torch.equal(model.forward(*given), before)


def test_patch_files_that_ranks_do_not_find_are_written_again_or_sent(
    model: RemoteModel, patches: WeightPatches, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = sample(model, patches=patches)
    assert torch.equal(sample(model), expected)
    for file in patches_folder().iterdir():
        file.unlink()
    half_written = patches_folder() / f"{2**30}-{'0' * 32}.unfinished"  # by a process that has ended
    half_written.touch()
    assert torch.equal(sample(model, patches=patches), wanted)
    assert not half_written.exists()
    sample(model)
    low = [low_rank(QKV, (768, 256), 7)]
    fresh, again = WeightPatches([(low[0], 1.0)]), WeightPatches([(low[0], 1.0)])
    there = os.environ["PARALLEL_MMDIT_RUNTIME_DIR"]
    with monkeypatch.context() as elsewhere:  # another host's runtime folder: the ranks don't see it
        elsewhere.setattr("parallel_backend.client.weight_patches.patches_folder", lambda: tmp_path / "patches")
        sent = sample(model, patches=fresh)
    assert os.environ["PARALLEL_MMDIT_RUNTIME_DIR"] == there
    assert torch.equal(sample(model, patches=again), sent)
    assert (sent - expected).abs().max() > 1e-3
