"""Each parallel method on its own, N gloo ranks against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_pool import RankPool, groups
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.distributed import cfg, collectives, data
from parallel_backend.distributed.attention import Joined, ParallelAttention
from parallel_backend.distributed.band import Band, facing_rows, with_rows_around
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.mesh import MeshAxis, build_mesh
from parallel_backend.errors import BackendError, InputError, RankError
from parallel_backend.fused.joint_heads import join_heads
from parallel_backend.rpc.wire import MAX_TENSORS


def world_axis() -> MeshAxis:
    return MeshAxis("all", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- collectives ------------------------------------------------------------------------------------------------


def gather_case(length: int, dim: int) -> bool:
    axis, full = world_axis(), seeded(3, length, 5).movedim(1, dim)
    sizes = collectives.split_sizes(length, axis.degree)
    start, stop = collectives.split_range(length, axis.degree, axis.rank)
    local = full.narrow(dim, start, stop - start)
    first = collectives.gather_to_first(local, dim, sizes, axis)
    assert (first is None) == (axis.rank > 0)
    assert first is None or torch.equal(torch.cat(first, dim), full)
    return torch.equal(collectives.all_gather(local, dim, sizes, axis), full)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("length", [2, 7, 12])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gathers_join_equal_and_unequal_slices(world_size: int, length: int, dim: int, ranks: RankPool) -> None:
    assert all(ranks(world_size, gather_case, length, dim))


def halo_case(rows: int, above: int, below: int) -> bool:
    axis, full = world_axis(), seeded(2, 3, rows, 4)
    start, stop = collectives.split_range(rows, axis.degree, axis.rank)
    padded, own = F.pad(full, (0, 0, above, below)), full[:, :, start:stop]
    band = Band(axis)
    told = band.tell("slot", facing_rows(own, above, below)).wait()
    found = with_rows_around(own, above, below, *band.facing(told, own, above, below))
    return torch.equal(found, padded[:, :, start : stop + above + below])


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize(("above", "below"), [(1, 1), (1, 0), (0, 1), (2, 2)])
def test_halo_is_the_neighbours_rows_and_zeros_outside(
    world_size: int, above: int, below: int, ranks: RankPool
) -> None:
    assert all(ranks(world_size, halo_case, 11, above, below))


def control_case() -> list[object]:
    control = Control()
    most = [memoryview(bytearray([number])) for number in range(1 + MAX_TENSORS)] if control.rank == 0 else None
    assert [frame[0] for frame in control.hand_on(most)] == list(range(1 + MAX_TENSORS))
    frames = [memoryview(bytearray(b"header")), memoryview(bytearray(range(200)))] if control.rank == 0 else None
    handed = [bytes(frame) for frame in control.hand_on(frames)]
    said = []
    for kind in ("own", "other"):

        def local(kind: str = kind) -> int:
            if control.rank == 1 and kind == "own":
                raise InputError("Rank 1 doesn't like it.", "Give another.")
            if control.rank == 1:
                raise ValueError("x" * 9000)
            return 5

        try:
            control.agreed(local)
        except BackendError as error:
            said.append((type(error), str(error)[:50]))
    return [handed, said, control.agreed(lambda: 5), control.any(control.rank == 0)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_control_hands_on_frames_and_makes_one_ranks_error_everybodys(world_size: int, ranks: RankPool) -> None:
    for handed, said, value, flag in ranks(world_size, control_case):
        assert handed == [b"header", bytes(range(200))]
        assert [kind for kind, _ in said] == [InputError, RankError]
        assert said[0][1].startswith("Rank 1 doesn't like it.") and said[1][1].startswith("Rank 1 failed: ValueError")
        assert value == 5 and flag


def long_error_case(message: str, remedy: str, details: str, folder: str) -> list[list[str]]:
    """What comes of an error of rank 1 alone, of the same on every rank, and of the job after them."""
    control = Control(dist.FileStore(f"{folder}/store", dist.get_world_size()))

    def local() -> None:
        if control.rank == 1:
            raise InputError(message, remedy, details)

    with pytest.raises(InputError) as alone:
        control.agreed(local)
    control.hand_on([memoryview(bytearray(b"job"))] if control.rank == 0 else None)
    together = control.verdict(InputError(message, remedy, details), [])
    assert isinstance(together, InputError) and control.agreed(lambda: 5) == 5
    return [[error.message, error.remedy, error.details] for error in (alone.value, together)]


@pytest.mark.parametrize("letter", ["模", "😀", "é", "x", "\udcff"])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_long_error_of_one_rank_reaches_all_in_any_alphabet(
    letter: str, shift: int, ranks: RankPool, tmp_path: Path
) -> None:
    """`shift` moves the characters against the border at which a note's bytes end; the last letter is no character at all."""
    message, remedy = "m" * shift + letter * 1600, "r" * shift + letter * 1600
    told = ranks(2, long_error_case, message, remedy, letter * 1600, str(tmp_path))
    assert told[0] == told[1]
    expected = letter if letter != "\udcff" else "?"
    pairs = [pair for words in told[0] for pair in zip(words[:2], ("m" * shift, "r" * shift), strict=True)]
    for text, start in pairs:
        assert text.startswith(start + expected * 400) and set(text) <= {*start, expected, *" ..."}
        assert text.isascii() or len(text) > 400
    assert all(set(words[2]) <= {expected, *" ..."} for words in told[0]), "details have what is left"


def test_a_short_error_is_told_whole(ranks: RankPool, tmp_path: Path) -> None:
    words = ["模型 sd3.5 😀 " * 60, "É" * 600, "a log's end\n" * 80]
    assert ranks(2, long_error_case, *words, str(tmp_path)) == [[words, words]] * 2


def batch_case(rows: int) -> bool:
    axis, full = world_axis(), seeded(rows, 3)
    local = data.shard_batch(full, axis)
    return torch.equal(data.gather_batch(local * 2, rows, axis), full * 2)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_batches_spread_and_come_back_in_order(rows: int, ranks: RankPool) -> None:
    assert all(ranks(2, batch_case, rows)) and all(ranks(4, batch_case, rows))


def branch_case() -> bool:
    axis, branches = world_axis(), [seeded(2, 3, seed=s) for s in range(2)]
    own = cfg.own_branches(branches, axis)
    both = cfg.gather_branches(own, 2, axis)
    alone = cfg.own_branches(branches[:1], axis)
    return len(own) == 1 and all(map(torch.equal, both, branches)) and len(alone) == 1


def test_cond_and_uncond_are_computed_by_one_rank_each(ranks: RankPool) -> None:
    assert all(ranks(2, branch_case))


# -- attention --------------------------------------------------------------------------------------------------


def attended(attention: ParallelAttention, qkv_BLNH: list[Tensor], counts: list[int]) -> Tensor:
    """Of tokens in two streams, as text and image are."""
    (B, L, N, H), text = qkv_BLNH[0].shape, qkv_BLNH[0].shape[1] // 3
    streams = [[x.flatten(2)[:, part] for x in qkv_BLNH] for part in (slice(text), slice(text, None))]
    no_norms, parts = (None, None), attention.mesh.ulysses.degree
    sent = join_heads(*streams, no_norms, no_norms, heads=N, parts=parts, eps=None)
    out = attention(Joined(sent, B, (text, L - text), N, H), counts)
    return torch.cat(out, dim=1).unflatten(2, (N, H))


def attention_case(mesh: MeshSpec, counts: list[int], heads: int, dtype: torch.dtype, alone: bool) -> float:
    """The largest relative error of this rank's part; with `alone` each rank attends to its own tokens only."""
    built = build_mesh(mesh, groups())
    q, k, v = (seeded(2, sum(counts), heads, 64, seed=s).to(dtype) for s in range(3))
    expected = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    start = sum(counts[: built.sp_rank])
    mine = slice(start, start + counts[built.sp_rank])
    if alone:
        out = F.scaled_dot_product_attention(*(x[:, mine].transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    else:
        out = attended(ParallelAttention(built, "native"), [x[:, mine] for x in (q, k, v)], counts)
    assert out.dtype == dtype
    return float((out - expected[:, mine]).abs().max() / expected.abs().max())


MESHES = [MeshSpec(ulysses=2), MeshSpec(ring=2), MeshSpec(ulysses=4), MeshSpec(ring=4), MeshSpec(ring=2, ulysses=2)]


@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("heads", [8, 38, 5])
def test_attention_over_ranks_equals_one_process(mesh: MeshSpec, divides: bool, heads: int, ranks: RankPool) -> None:
    counts = [24] * mesh.world_size if divides else [25, 24, 20, 31][: mesh.world_size]
    errors = ranks(mesh.world_size, attention_case, mesh, counts, heads, torch.float32, False)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("mesh", MESHES, ids=MeshSpec.describe)
def test_attention_in_bfloat16_stays_in_its_rounding(mesh: MeshSpec, ranks: RankPool) -> None:
    counts = [25, 24, 20, 31][: mesh.world_size]
    assert max(ranks(mesh.world_size, attention_case, mesh, counts, 6, torch.bfloat16, False)) < 2e-2


def test_negative_control_attention_to_local_tokens_only_is_far_off(ranks: RankPool) -> None:
    assert min(ranks(2, attention_case, MeshSpec(ring=2), [25, 24], 8, torch.float32, True)) > 0.1
