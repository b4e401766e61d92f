"""Calls of all ranks under NCCL's rules: in no mixture do they stand still; where they would, it is told.

Ranks are gloo's, on CPUs; what they ask of torch.distributed is written down and played as NCCL does it: see nccl_order/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
from nccl_order.mixtures import (
    Sampling,
    record_bands,
    record_inside,
    record_samplings,
    record_with_one_group_both_ways,
    sampling,
    this_rank,
)
from nccl_order.rules import PLAIN, STRICTEST, Rules, calls, faults
from nccl_order.trace import Call, Trace, Wait
from rank_pool import RankPool

from parallel_backend import MeshSpec
from parallel_backend.checkpoint_files.taesd_files import taesd_files
from parallel_backend.config import UNET_AXES
from parallel_backend.distributed import collectives
from parallel_backend.distributed.mesh import MeshAxis
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.unet import small_unet_config, write_unet

pytestmark = pytest.mark.busy

# -- the rules, on calls written by hand --------------------------------------------------------------------------


def send(to: int, nbytes: int = 64, group: str = "g", world: int = 2) -> Call:
    return Call(group, tuple(range(world)), "send", sends=((to, nbytes),))


def receive(source: int, nbytes: int = 64, group: str = "g", world: int = 2) -> Call:
    return Call(group, tuple(range(world)), "receive", receives=((source, nbytes),))


def gather(nbytes: int = 64, group: str = "g", world: int = 2) -> Call:
    return Call(group, tuple(range(world)), "all_gather", nbytes)


def batch(*messages: Call) -> Call:
    sides = {side: tuple(m for call in messages for m in getattr(call, side)) for side in ("sends", "receives")}
    return Call(messages[0].group, messages[0].ranks, "batch", **sides)


def on_host(call: Call) -> Call:
    return replace(call, on_host=True)


def on_the_stream(call: Call) -> Call:
    return replace(call, on_own_stream=False)


GOOD: dict[str, list[Trace]] = {
    "nothing": [[], []],
    "collectives": [[gather(), gather(8), Wait(0), Wait(1)], [gather(), gather(8), Wait(1), Wait(0)]],
    "one way and then the other": [[send(1), receive(1), Wait(0), Wait(1)], [receive(0), send(0), Wait(0), Wait(1)]],
    "both ways in a batch": [
        [batch(send(1), receive(1, 32)), Wait(0)],
        [batch(receive(0), send(0, 32)), Wait(0)],
    ],
    "both ways at once in two groups": [
        [gather(), on_the_stream(gather(8, "back")), send(1), receive(1, 64, "back"), Wait(2), Wait(3)],
        [gather(), on_the_stream(gather(8, "back")), receive(0), send(0, 64, "back"), Wait(2), Wait(3)],
    ],
    "a flag by gloo before its message": [
        [on_host(send(1, 1)), send(1), Wait(0), Wait(1)],
        [on_host(receive(0, 1)), Wait(0), receive(0), Wait(2)],
    ],
    "a ring of three": [
        [batch(send((r + 1) % 3, 8, world=3), receive((r - 1) % 3, 8, world=3)), Wait(0)] for r in range(3)
    ],
    "halos of three bands": [
        [batch(send(1, world=3), receive(1, world=3)), Wait(0)],
        [batch(send(0, world=3), receive(0, world=3), send(2, world=3), receive(2, world=3)), Wait(0)],
        [batch(send(1, world=3), receive(1, world=3)), Wait(0)],
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_calls_that_come_to_their_end_have_no_fault(name: str) -> None:
    assert faults(GOOD[name], PLAIN) == faults(GOOD[name], STRICTEST) == []


BAD: dict[str, tuple[list[Trace], list[str]]] = {
    "collectives in another order": (
        [[gather(8), gather(16)], [gather(16), gather(8)]],
        ["g: collective 0 is, on rank 0, all_gather 8 B on g; on rank 1, all_gather 16 B on g"],
    ),
    "collectives of two groups in another order, each waited for": (
        [[on_the_stream(gather(8, name)) for name in order] for order in (["a", "b"], ["b", "a"])],
        [
            "a circle: rank 0 has a, which waits until rank 1 has come to the making of a, which waits until rank 1 has b"
        ],
    ),
    "a collective that one rank leaves out": (
        [[gather(), Wait(0)], []],
        ["on rank 1, no more", "never: rank 1 has come to the making of g <- "],
    ),
    "another root": (
        [[Call("g", (0, 1), "broadcast", 8, root=0)], [Call("g", (0, 1), "broadcast", 8, root=1)]],
        ["broadcast 8 B of rank 0 on g; on rank 1, broadcast 8 B of rank 1"],
    ),
    "a receive of another size": (
        [[send(1), send(1, 32)], [receive(0), receive(0, 31)]],
        ["g between 0 and 1: message 1 from 0 to 1: 32 B is sent, 31 B is received"],
    ),
    "a part of a batch without its other end": (
        [[batch(send(1), receive(1)), Wait(0)], [batch(receive(0)), Wait(0)]],
        ["g: message 0 from 1 to 0: nothing is sent, 64 B is received", "never: rank 1 starts its number 0"],
    ),
    "parts of an all-to-all of other sizes": (
        [[Call("g", (0, 1), "all_to_all", sends=((1, 8),))], [Call("g", (0, 1), "all_to_all", receives=((0, 4),))]],
        ["g: message 0 from 0 to 1: 8 B is sent, 4 B is received"],
    ),
    "a batch that meets messages outside one": (
        [[batch(send(1))], [receive(0)]],
        ["g: message 0 from 0 to 1: 64 B is sent, nothing is received", "never: rank 1 has come to the making of g"],
    ),
    "both ways at once between two ranks of one group": (
        [[send(1), Wait(0), receive(1), send(1)], [receive(0), receive(0), Wait(0), send(0)]],
        ["a circle: ", "rank 0 ends 2: receive 64 B from 1 on g"],
    ),
    "a group's first batch without one of its members": (
        [[batch(send(1, world=3))], [batch(receive(0, world=3))], []],
        ["never: rank 2 has come to the making of g"],
    ),
    # Rank 1 would send what rank 0 waits for once it has made a communicator, for which it needs rank 0.
    "a communicator whose making waits for what is launched after it": (
        [[on_host(receive(1, 1)), Wait(0), gather()], [gather(), on_host(send(0, 1))]],
        ["a circle: ", "rank 1 has g", "rank 0 has come to the making of g", "rank 0 passes its wait 1"],
    ),
    "two ranks that make two communicators in another order": (
        [[send(1), gather()], [gather(), receive(0)]],
        [
            "a circle: rank 0 has g between 0 and 1, which waits until rank 1 has come to the making of g between 0 and 1"
        ],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_calls_that_do_not_are_told_by_rank_and_communicator(name: str) -> None:
    traces, words = BAD[name]
    told = "\n".join(faults(traces, PLAIN))
    assert all(word in told for word in words), told


STRICTER: dict[str, tuple[Rules, list[Trace]]] = {
    "a host that waits for its device before it says so by gloo": (
        replace(PLAIN, host_waits=True),
        [
            [receive(1), Wait(0), receive(1), Wait(2), on_host(send(1, 1))],
            [send(0), Wait(0), on_host(receive(0, 1)), Wait(2), send(0)],
        ],
    ),
    # Rank 1 has the next receive in flight when it first sends back; rank 0 sends again once it has the way back.
    "a communicator made in full flight": (
        replace(PLAIN, creation_drains=True),
        [
            [send(1), receive(1, group="back"), send(1), Wait(1)],
            [receive(0), receive(0), Wait(0), send(0, group="back")],
        ],
    ),
    # What rank 1 takes first was launched last, behind a message that stands in another line.
    "one queue for all streams": (
        replace(PLAIN, one_queue=True),
        [
            [send(1), send(1, group="h"), send(1), send(1), send(1, group="h")],
            [receive(0), receive(0, group="h"), receive(0, group="h"), Wait(2), receive(0), receive(0)],
        ],
    ),
}


@pytest.mark.parametrize("name", STRICTER)
def test_each_stricter_rule_finds_what_the_plain_ones_let_pass(name: str) -> None:
    rules, traces = STRICTER[name]
    assert faults(traces, PLAIN) == []
    assert faults(traces, rules)[0].startswith("a circle: ")


# -- what is written down -------------------------------------------------------------------------------------------


def every_kind_of_call() -> Trace:
    """On two ranks, each over the whole world; one of them on the host."""
    recorder = this_rank().recorder
    with recorder.recording() as trace:
        axis = MeshAxis("all", 2, dist.get_rank(), dist.group.WORLD)
        x, other, up = torch.ones(4, device="cpu"), 1 - axis.rank, axis.rank == 0
        collectives.start_all_reduce(x, axis).wait()
        collectives.first_says(True, axis)
        collectives.all_to_all(torch.cat([x, x[:1]]), [4, 1], [4, 4] if up else [1, 1], axis)
        handle = collectives.start_send(x, other, axis) if up else collectives.start_receive(x, other, axis)
        handle.wait()
        collectives.gather_to_first(x, 0, [4, 4], axis)
    return trace


def test_calls_are_written_down_with_their_sizes_and_waits(ranks: RankPool) -> None:
    traces = ranks(2, every_kind_of_call)
    told = [call.told() for _, call in calls(traces[0])]
    assert told == [
        "all_reduce 16 B on [0, 1]",
        "broadcast 1 B of rank 0 on [0, 1] by gloo",
        "all_to_all 16 B to 0, 4 B to 1, 16 B from 0, 16 B from 1 on [0, 1]",
        "send 16 B to 1 on [0, 1]",
        "gather 16 B of rank 0 on [0, 1]",
    ]
    own_stream = [call.on_own_stream for _, call in calls(traces[0])]
    assert own_stream == [True, False, False, True, False]
    waits = [entry.of for entry in traces[1] if isinstance(entry, Wait)]
    assert sorted(set(waits)) == [number for number, _ in calls(traces[1])] and waits == sorted(waits)
    assert faults(traces) == []


# -- the mixtures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mmdit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config("sd3.5-medium", pos_embed_size=16)
    return write_mmdit(tmp_path_factory.mktemp("mmdit") / "m.safetensors", config)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unet(tmp_path_factory.mktemp("unet") / "m.safetensors", small_unet_config((64, 64), (0, 1)))


MMDIT_SIZE, UNET_SIZE = (16, 12, 8), (4, 10, 4)
UNEQUAL, EQUAL, ONE = (13, 9), (9, 9), (9,)


def jobs_of(mesh: MeshSpec) -> list[Sampling]:
    """Three pictures each: exact ones, and displaced ones where the mesh has them; on two ranks some more, and a cancel."""
    displaced = {"steps": 3, "warmup_steps": 1, "num_patches": 3 if mesh.pp > 1 else 0}
    can_be_displaced = mesh.pp * mesh.ring * mesh.patch > 1
    if mesh.world_size > 2:
        tokens = UNEQUAL if mesh.pp > 1 else EQUAL
        return [sampling(steps=1), *([sampling(tokens=tokens, **displaced)] if can_be_displaced else [])]
    jobs = [sampling(steps=2), sampling(steps=2, tokens=ONE)]
    if can_be_displaced:
        jobs += [sampling(tokens=tokens, **displaced) for tokens in (UNEQUAL, EQUAL)]
        jobs.append(sampling(given_up=4, **displaced | {"steps": 5}))
    return jobs


def assert_in_order(traces: Sequence[Trace]) -> None:
    assert faults(traces) == []
    flags = [call for trace in traces for _, call in calls(trace) if call.on_host and not call.group.startswith("gloo")]
    sizes = [max([call.nbytes, *(nbytes for _, nbytes in call.sends + call.receives)]) for call in flags]
    assert set(sizes) <= {1}, "of what the axes send, only flags are on the CPU"


def assert_in_order_and_warm(recorded: Sequence[tuple[Trace, int]], *, all_used: bool = True) -> None:
    """And the communicators that jobs use are made when the model is loaded, the whole world's at the start.

    Args:
        all_used: no others are; False where none of the jobs has displaced steps, for which there is a way back.
    """
    assert_in_order([trace for trace, _ in recorded])
    for rank, (trace, loading) in enumerate(recorded):
        made, used = (
            {
                call.communicator(rank)
                for number, call in calls(trace)
                if not call.on_host and (number < loading) == early
            }
            for early in (True, False)
        )
        world = {str(list(range(len(recorded))))}
        assert used - world <= made, f"rank {rank} makes communicators in full flight"
        assert not all_used or made - world <= used, f"rank {rank} has communicators that it never uses"


@pytest.mark.parametrize("mesh", MeshSpec.all_of(2) + MeshSpec.all_of(4), ids=MeshSpec.describe)
def test_no_mixture_of_the_transformers_stands_still(mesh: MeshSpec, mmdit: Path, ranks: RankPool) -> None:
    recorded = ranks(mesh.world_size, record_samplings, mmdit, mesh, jobs_of(mesh), MMDIT_SIZE, (3,))
    assert_in_order_and_warm(recorded)
    assert all(sum(not call.on_host for _, call in calls(trace)) >= 4 for trace, _ in recorded)


UNET_MESHES = [
    msgspec.structs.replace(mesh, sliced=sliced)
    for mesh in MeshSpec.all_of(2, UNET_AXES) + MeshSpec.all_of(4, UNET_AXES)
    for sliced in (False, True)
    if not sliced or mesh.cfg * mesh.patch > 1
]


@pytest.mark.parametrize("mesh", UNET_MESHES, ids=MeshSpec.describe)
def test_no_mixture_of_the_unets_stands_still(mesh: MeshSpec, unet: Path, ranks: RankPool) -> None:
    single = (1, 3) if mesh.patch == 1 else (3,)
    assert_in_order_and_warm(ranks(mesh.world_size, record_samplings, unet, mesh, jobs_of(mesh), UNET_SIZE, single))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["kl", "taesd"])
def test_bands_of_a_vae_do_not_stand_still(world_size: int, kind: str, models: Path, ranks: RankPool) -> None:
    """Of more rows than ranks and of fewer, one picture and several, one of each given up."""
    paths = (
        [models / "vae" / "sd3_vae.safetensors"] if kind == "kl" else list(taesd_files(models / "vae_approx", "taesd3"))
    )
    assert_in_order(ranks(world_size, record_bands, paths, 16, [(2, 5, 2), (1, 3, 1)]))


INSIDE_MMDITS = [MeshSpec(cfg=2, ring=2), MeshSpec(dp=2, ulysses=2), MeshSpec(cfg=2, tp=2), MeshSpec(pp=2)]
INSIDE_UNETS = [MeshSpec(patch=3), MeshSpec(cfg=2, patch=2), MeshSpec(dp=2, cfg=2)]


@pytest.mark.parametrize("mesh", INSIDE_MMDITS + INSIDE_UNETS, ids=MeshSpec.describe)
def test_what_hangs_inside_does_not_stand_still(mesh: MeshSpec, mmdit: Path, unet: Path, ranks: RankPool) -> None:
    given = (unet, mesh, (4, 16, 8)) if mesh in INSIDE_UNETS else (mmdit, mesh, MMDIT_SIZE)
    assert_in_order_and_warm(ranks(mesh.world_size, record_inside, *given), all_used=mesh.pp == 1)


# Three axes at once; any two are above, on four ranks.
EIGHT = [MeshSpec(cfg=2, ring=2, tp=2), MeshSpec(cfg=2, pp=2, ulysses=2)]
EIGHT_OF_UNETS = [MeshSpec(cfg=2, patch=4, sliced=True), MeshSpec(dp=2, cfg=2, patch=2)]


@pytest.mark.parametrize("mesh", EIGHT + EIGHT_OF_UNETS, ids=MeshSpec.describe)
def test_eight_ranks_do_not_stand_still(mesh: MeshSpec, mmdit: Path, unet: Path, ranks: RankPool) -> None:
    path, size = (mmdit, MMDIT_SIZE) if mesh.patch == 1 else (unet, UNET_SIZE)
    assert_in_order_and_warm(ranks(8, record_samplings, path, mesh, jobs_of(mesh)[-1:], size))


# -- planted faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [MeshSpec(pp=2), MeshSpec(cfg=2, pp=2)], ids=MeshSpec.describe)
def test_a_way_back_in_the_group_of_the_way_there_is_a_circle(mesh: MeshSpec, mmdit: Path, ranks: RankPool) -> None:
    """The last stage posts its next receive before it sends back, the first receives before it sends again."""
    jobs = [sampling(steps=3, warmup_steps=1, num_patches=3)]
    recorded = ranks(mesh.world_size, record_with_one_group_both_ways, mmdit, mesh, jobs, MMDIT_SIZE)
    (told,) = faults([trace for trace, _ in recorded], PLAIN)
    assert told.startswith("a circle: rank 0 ends") and "receive" in told and "send" in told and "way back" not in told
    assert_in_order_and_warm(ranks(mesh.world_size, record_samplings, mmdit, mesh, jobs, MMDIT_SIZE))


def test_a_way_back_that_is_made_in_full_flight_can_be_a_circle(mmdit: Path, ranks: RankPool) -> None:
    """The same calls without those of loading: where the making of a communicator waits for what the device has to do."""
    jobs = [sampling(steps=3, warmup_steps=1, num_patches=3)]
    recorded = ranks(2, record_samplings, mmdit, MeshSpec(pp=2), jobs, MMDIT_SIZE)
    cold = [
        [replace(entry, of=entry.of - loading) if isinstance(entry, Wait) else entry for entry in trace[loading:]]
        for trace, loading in recorded
    ]
    assert faults(cold, PLAIN) == []
    (told,) = faults(cold, replace(PLAIN, creation_drains=True))
    assert "rank 1 has come to the making of way back [0, 1] between 0 and 1" in told
