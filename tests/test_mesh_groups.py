"""The groups of a mesh: warm once it is made, gone with the last model in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool, groups

from parallel_backend import Backend, MeshSpec
from parallel_backend.distributed.collectives import start_all_reduce
from parallel_backend.distributed.mesh import Groups, build_mesh
from parallel_backend.distributed.warm_up import warm_up
from parallel_backend.errors import ConfigError


def groups_after(specs: list[MeshSpec], kept: list[MeshSpec]) -> tuple[int, float]:
    """How many groups there are once only some of the meshes are kept, and a sum over an axis that is made anew."""
    own = Groups()
    meshes = {spec: build_mesh(spec, own) for spec in specs}
    for mesh in meshes.values():
        warm_up(mesh, torch.device("cpu"))
    own.keep_only([meshes[spec] for spec in kept], bands=False)
    left = len(own._groups)
    again = build_mesh(specs[0], own)
    return left, start_all_reduce(torch.ones(1), again.ulysses).wait().item()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_groups_leave_with_the_last_mesh_that_has_them_and_come_again(kept: int, ranks: RankPool) -> None:
    """Two meshes that share the pairs (0, 1) and (2, 3): ulysses of one, tp of the other."""
    specs = [MeshSpec(cfg=2, ulysses=2), MeshSpec(pp=2, tp=2)]
    # cfg or pp over (0, 2), (1, 3); the pairs; all four; and for pp the way back and the first stage, (0, 1), which is a pair too.
    expected = [0, 5, 7][kept]
    assert ranks(4, groups_after, specs, specs[:kept]) == [(expected, 2.0)] * 4


@pytest.mark.parametrize("spec", [MeshSpec(pp=4), MeshSpec(pp=2, cfg=2), MeshSpec(ring=2, ulysses=2), MeshSpec(tp=4)])
def test_a_mesh_is_warm_after_one_message_on_each_communicator(spec: MeshSpec, ranks: RankPool) -> None:
    assert all(ranks(4, warmed, spec))


def warmed(spec: MeshSpec) -> bool:
    mesh = build_mesh(spec, groups())
    before = [axis.traffic.collectives for axis in mesh.axes]
    warm_up(mesh, torch.device("cpu"))
    return all(
        axis.traffic.collectives > count for axis, count in zip(mesh.axes, before, strict=True) if axis.degree > 1
    )


def test_groups_of_a_backend_come_and_go_with_its_models(backend2: Backend, large: Path) -> None:
    """Through many meshes, one after the other: the ranks' threads are those of the groups that are in use."""
    backend2.unload()
    backend2.load_model(large, MeshSpec(cfg=2), "float32")
    before = threads(backend2)
    for spec in (MeshSpec(pp=2), MeshSpec(ring=2), MeshSpec(tp=2), MeshSpec(pp=2), MeshSpec(cfg=2)):
        backend2.unload()
        backend2.load_model(large, spec, "float32")
    assert threads(backend2) == before
    with pytest.raises(ConfigError, match="patch=2 can't be used"):
        backend2.load_model(large, MeshSpec(patch=2), "float32")
    assert threads(backend2) == before, "a mesh that is refused makes no groups"


def threads(backend: Backend) -> int:
    return len(os.listdir(f"/proc/{backend.status().ranks[1].pid}/task"))
