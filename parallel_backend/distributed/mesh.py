"""Degrees become process groups: the one place that knows ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config import AXES, MeshSpec
from ..errors import ConfigError
from .traffic import Traffic

# Of a collective, after which torch itself ends the rank. The ranks' watch is faster, unless its own process stands still.
COLLECTIVE_TIMEOUT = timedelta(seconds=900)


@dataclass(frozen=True)
class MeshAxis:
    """One axis of a mesh as this rank sees it. Degree 1 has no group, and nothing is sent along it."""

    name: str
    degree: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def global_rank(self, axis_rank: int) -> int:
        """The world's number of the rank at `axis_rank`."""
        if self.group is None:
            return dist.get_rank() if dist.is_initialized() else 0
        return dist.get_global_rank(self.group, axis_rank)


@dataclass(frozen=True)
class Mesh:
    """This rank's axes.

    Args:
        way_back: the ranks of pp once more, for what the last stage sends the first. With NCCL, messages of one group
            between two ranks wait for each other, and two stages would stand still.
        first_stage: the ranks of the first stage of several; only they have it.
        weights: the ranks that share out a model's weights in slices.
        everyone: all ranks, for what they decide together, a few numbers on the CPU.
    """

    spec: MeshSpec
    dp: MeshAxis
    cfg: MeshAxis
    pp: MeshAxis
    patch: MeshAxis
    ring: MeshAxis
    ulysses: MeshAxis
    tp: MeshAxis
    way_back: MeshAxis = field(default_factory=lambda: MeshAxis("way_back"))
    first_stage: MeshAxis = field(default_factory=lambda: MeshAxis("first_stage"))
    weights: MeshAxis = field(default_factory=lambda: MeshAxis("weights"))
    everyone: MeshAxis = field(default_factory=lambda: MeshAxis("everyone"))

    @property
    def axes(self) -> list[MeshAxis]:
        """Those whose traffic is told apart."""
        return [*(getattr(self, axis) for axis in AXES), self.weights]

    @property
    def counted(self) -> list[MeshAxis]:
        """All along which an evaluation may send: `axes`, and what all ranks decide."""
        return [*self.axes, self.everyone]

    @property
    def sp_degree(self) -> int:
        return self.ring.degree * self.ulysses.degree

    @property
    def sp_rank(self) -> int:
        """Position in the token order: ring is outer, ulysses inner."""
        return self.ring.rank * self.ulysses.degree + self.ulysses.rank


class Groups:
    """Process groups by their ranks, each made once: meshes whose axes join the same ranks share them.

    A group costs memory on a GPU (NCCL's buffers), and gloo's costs time even when idle: a thread that wakes for each.
    Every rank of the world must ask for the same groups, and let them go, in the same order.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def of(self, ranks: Sequence[int], use: str = "") -> dist.ProcessGroup:
        """`use` keeps apart groups of the same ranks whose messages must not wait for each other.

        Comm: a group creation at the first use of these ranks.
        """
        key = (use, tuple(ranks))
        if key not in self._groups:
            world = dist.group.WORLD
            whole = key == ("", tuple(range(self.world_size))) and world is not None
            self._groups[key] = world if whole else dist.new_group(list(ranks), timeout=COLLECTIVE_TIMEOUT)  # type: ignore[assignment]
        return self._groups[key]

    def keep_only(self, meshes: Sequence[Mesh], bands: bool) -> None:
        """Lets go of the groups that none of these meshes has, on any rank; of those of bands too where none are to come.

        Comm: where there are any, one byte over the world: who lets go first could cut off what others still receive.
        """
        kept = {key for mesh in meshes for key in group_keys(mesh.spec)}
        if bands:
            kept |= {("", tuple(range(degree))) for degree in range(2, self.world_size + 1)}
        gone = [key for key in self._groups if key not in kept]
        if gone and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if gone:
            dist.all_reduce(torch.zeros(1, dtype=torch.uint8))
        for key in gone:
            group = self._groups.pop(key)
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def axis(self, name: str, groups_of_ranks: Sequence[Sequence[int]], use: str = "") -> MeshAxis:
        """This rank's axis among groups of ranks, of which one has it.

        Comm: as `of`, for each group of 2 ranks or more.
        """
        found = MeshAxis(name)
        for ranks in groups_of_ranks:
            group = self.of(ranks, use) if len(ranks) > 1 else None
            if self.rank in ranks:
                found = MeshAxis(name, len(ranks), ranks.index(self.rank), group)
        return found


# Whose messages must not wait for those of another axis over the same ranks.
_WEIGHTS, _WAY_BACK = "weights", "way back"


def _uses(spec: MeshSpec) -> dict[str, tuple[str, list[list[int]]]]:
    """Each axis of the mesh with its use and its groups of ranks, in the order in which they are made."""
    found = {axis: ("", spec.groups(axis)) for axis in AXES} | {"everyone": ("", spec.groups(*AXES))}
    if spec.sliced:
        found["weights"] = (_WEIGHTS, spec.groups("cfg", "patch"))
    if spec.pp > 1:
        found["way_back"] = (_WAY_BACK, spec.groups("pp"))
        found["first_stage"] = ("", [[ranks[0] for ranks in spec.groups("pp")]])
    return found


def group_keys(spec: MeshSpec) -> set[tuple[str, tuple[int, ...]]]:
    """What `Groups` knows the groups of a mesh by."""
    return {(use, tuple(ranks)) for use, groups in _uses(spec).values() for ranks in groups if len(ranks) > 1}


def build_mesh(spec: MeshSpec, groups: Groups | None = None) -> Mesh:
    """The mesh of `spec` over the whole world.

    Raises: ConfigError: the product of degrees is not the world's size.
    Comm: as `Groups.of`, for every group of every axis of degree 2 or more.
    """
    groups = groups or Groups()
    spec.check_world(groups.world_size)
    axes = {name: groups.axis(name, ranks, use) for name, (use, ranks) in _uses(spec).items()}
    if "way_back" in axes:
        axes["way_back"] = replace(axes["way_back"], traffic=axes["pp"].traffic)
    return Mesh(spec, **axes)


class BandAxes:
    """Axes over the first k ranks of the world, for images with fewer rows than there are ranks."""

    def __init__(self, groups: Groups | None = None) -> None:
        self._groups = groups or Groups()
        self.traffic = Traffic()
        self.world_size = self._groups.world_size

    def first(self, degree: int) -> MeshAxis | None:
        """The axis over ranks 0 to degree - 1; None on a rank beyond it.

        Comm: as `Groups.of`; every rank of the world must call this.
        """
        if not 1 <= degree <= self.world_size:
            raise ConfigError(
                f"{degree} bands can't be spread over {self.world_size} ranks.", "Use at most one band a rank."
            )
        group = self._groups.of(range(degree)) if degree > 1 else None
        rank = self._groups.rank
        return MeshAxis("band", degree, rank, group, self.traffic) if rank < degree else None
