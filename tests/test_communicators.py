"""How many communicators a rank has and how they come about, without processes: groups are counted, messages noted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from nccl_order.rules import faults
from nccl_order.trace import Call
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.config import MMDIT_AXES, UNET_AXES
from parallel_backend.distributed import collectives, mesh, warm_up
from parallel_backend.distributed.mesh import Mesh, MeshAxis, build_mesh
from parallel_backend.distributed.stale import ALIGNED, _Bucket
from parallel_backend.rank import world

WORLD = 8
MESHES = {
    "transformers": MeshSpec.all_of(WORLD, MMDIT_AXES),
    "UNets": MeshSpec.all_of(WORLD, UNET_AXES),
    "sliced UNets": [msgspec.structs.replace(spec, sliced=True) for spec in MeshSpec.all_of(WORLD, UNET_AXES)],
}
# Of one rank, with that of the whole world. Each takes up to hundreds of MB of a GPU.
MOST = {"transformers": 6, "UNets": 4, "sliced UNets": 5}


@dataclass(frozen=True, eq=False)
class Group:
    ranks: tuple[int, ...]


@dataclass
class OneRank:
    """torch.distributed as one rank of `size` sees it; nothing is sent."""

    rank: int
    size: int
    made: list[tuple[int, ...]] = field(default_factory=list)
    communicators: set[tuple[Any, ...]] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.group = SimpleNamespace(WORLD=Group(tuple(range(self.size))))
        self.communicators.add((self.group.WORLD,))
        self.P2POp = lambda op, x, peer, group: (op.__name__, x.nbytes, peer, group)

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return self.rank

    def get_global_rank(self, group: Group, rank: int) -> int:
        return group.ranks[rank]

    def new_group(self, ranks: Sequence[int], timeout: timedelta) -> Group:
        """Without a backend of its own: the group inherits both, and a tensor's device decides."""
        self.made.append(tuple(ranks))
        return Group(tuple(ranks))

    def all_reduce(self, x: Tensor, group: Group, async_op: bool) -> SimpleNamespace:
        self.communicators.add((group,))
        return SimpleNamespace(wait=lambda: None)

    def all_to_all_single(
        self, into: Tensor, x: Tensor, arriving: Sequence[int], leaving: Sequence[int], group: Group
    ) -> None:
        self.communicators.add((group,))

    def isend(self, x: Tensor, peer: int, group: Group) -> SimpleNamespace:
        self.communicators.add((group, peer))
        return SimpleNamespace(wait=lambda: None)

    def irecv(self, x: Tensor, peer: int, group: Group) -> SimpleNamespace:
        return self.isend(x, peer, group)

    def batch_isend_irecv(self, ops: Sequence[tuple[str, int, int, Group]]) -> list[Any]:
        sides = [tuple((peer, n) for name, n, peer, _ in ops if name == kind) for kind in ("isend", "irecv")]
        self.calls.append(Call("g", ops[0][3].ranks, "batch", sends=sides[0], receives=sides[1]))
        return []


@contextmanager
def as_one_rank(rank: int, size: int = WORLD) -> Iterator[OneRank]:
    seen = OneRank(rank, size)
    with mock.patch.object(mesh, "dist", seen), mock.patch.object(collectives, "dist", seen):
        yield seen


def warmed(spec: MeshSpec, rank: int) -> tuple[Mesh, OneRank]:
    with as_one_rank(rank) as seen:
        built = build_mesh(spec)
        warm_up.warm_up(built, torch.device("cpu"))
    return built, seen


@pytest.mark.parametrize("kind", MESHES)
def test_no_mesh_of_eight_has_more_communicators_on_a_rank_than_the_budget(kind: str) -> None:
    table = {
        spec.describe(): max(len(warmed(spec, rank)[1].communicators) for rank in range(WORLD)) for spec in MESHES[kind]
    }
    assert {name: count for name, count in table.items() if count > MOST[kind]} == {}
    assert max(table.values()) == MOST[kind], "the budget is what is needed"


@pytest.mark.parametrize("spec", [spec for specs in MESHES.values() for spec in specs], ids=MeshSpec.describe)
def test_all_ranks_make_the_same_groups_in_the_same_order(spec: MeshSpec) -> None:
    by_rank = [warmed(spec, rank) for rank in range(WORLD)]
    assert all(seen.made == by_rank[0][1].made for _, seen in by_rank)
    for built, _ in by_rank:
        assert built.pp.degree == 1 or built.way_back.group not in (None, built.pp.group)
        assert built.weights.degree == 1 or built.weights.group not in (built.cfg.group, built.patch.group)


@pytest.mark.parametrize(("device", "backend"), [("cuda", "cpu:gloo,cuda:nccl"), ("cpu", "gloo")])
def test_communicators_are_made_lazily_and_tensors_on_the_cpu_go_by_gloo(device: str, backend: str) -> None:
    """With a device_id all of a group's messages would be in one line, and a pipeline stand still."""
    with (
        mock.patch.dict("os.environ", RANK="0", WORLD_SIZE="2"),
        mock.patch.multiple(world, _own_store=mock.DEFAULT, _await_all=mock.DEFAULT, Control=mock.DEFAULT),
        mock.patch.object(world, "prove_links"),
        mock.patch.object(world.dist, "init_process_group") as begun,
    ):
        world.meet(torch.device(device), lambda error: None)
    assert begun.call_args.args == (backend,) and "device_id" not in begun.call_args.kwargs


# -- messages to neighbours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [2, 3, 5])
@pytest.mark.parametrize(("above", "below"), [(1, 1), (1, 0), (0, 1), (2, 1)])
def test_every_rank_has_a_part_in_an_exchange_with_neighbours(degree: int, above: int, below: int) -> None:
    """As NCCL wants it of a group's first batch; parts of no size are left out on both sides."""
    traces = []
    for rank in range(degree):
        with as_one_rank(rank, degree) as seen:
            axis = MeshAxis("patch", degree, rank, seen.group.WORLD)  # type: ignore[arg-type]
            collectives.exchange_halo(torch.zeros(1, 2, 4 + rank, 3), above, below, axis)
        (call,) = seen.calls
        assert all(nbytes > 0 for _, nbytes in call.sends + call.receives)
        traces.append([call])
    assert faults(traces) == []


@pytest.mark.parametrize("kept", ["start_all_gather", "start_neighbour_exchange"])
def test_what_is_sent_lives_until_it_is_waited_for(kept: str) -> None:
    x = torch.zeros(6, 4).t()  # what is sent is a copy of it, which nobody else has
    with as_one_rank(0, 2) as seen, mock.patch.object(collectives, "_all_gather_flat") as gathering:
        axis = MeshAxis("patch", 2, 0, seen.group.WORLD)  # type: ignore[arg-type]
        if kept == "start_all_gather":
            handle = collectives.start_all_gather(x, axis)
            assert gathering.call_args.args[1] is handle.keep[0]
        else:
            handle = collectives.start_neighbour_exchange(x, x, (24, 24), axis)
            handle.works = [mock.Mock()]
        assert len(handle.keep) == 1 and torch.equal(handle.keep[0], x)
        handle.wait()
    assert handle.keep == () and handle.works == ()


# -- buckets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_in_a_bucket_of_bytes_start_where_any_type_may(dtype: torch.dtype) -> None:
    """Of odd sizes, for three ranks; and what neighbours send."""
    axis = MeshAxis("patch", 3, 1)
    bucket, sizes = _Bucket(axis), [(1, 3, 7), (5,), (2, 9), (1,)]
    for number, shape in enumerate(sizes):
        shapes = [(n + rank, *shape[1:]) for rank in range(3) for n in shape[:1]]
        shared = bucket.share(torch.zeros(shapes[1], dtype=dtype), shapes)
        faced = bucket.face(torch.zeros(3 + number, dtype=dtype), torch.zeros(5, dtype=dtype), (number + 1, 7))
        starts = [start for start, _ in shared.places] + list(faced.starts)
        assert all(start % ALIGNED == 0 for start in starts)
    assert sum(x.numel() for x in bucket.to_all) == bucket.used[1]
    assert ALIGNED % 16 == 0 and all(used % ALIGNED == 0 for used in (*bucket.used, *bucket.arriving))
