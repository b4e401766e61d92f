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
from nccl_order.trace import Call
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.config import MMDIT_AXES, UNET_AXES
from parallel_backend.distributed import collectives, mesh, warm_up
from parallel_backend.distributed.mesh import Mesh, MeshAxis, build_mesh
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


# -- messages -------------------------------------------------------------------------------------------------------


def test_what_is_sent_lives_until_it_is_waited_for() -> None:
    x = torch.zeros(6, 4).t()  # what is sent is a copy of it, which nobody else has
    with as_one_rank(0, 2) as seen, mock.patch.object(collectives, "_all_gather_flat") as gathering:
        axis = MeshAxis("patch", 2, 0, seen.group.WORLD)  # type: ignore[arg-type]
        handle = collectives.start_all_gather(x, axis)
        assert gathering.call_args.args[1] is handle.keep[0]
        assert len(handle.keep) == 1 and torch.equal(handle.keep[0], x)
        handle.wait()
    assert handle.keep == () and handle.works == ()
