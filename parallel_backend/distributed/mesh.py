"""Degrees become process groups: the one place that knows ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..config import AXES, DeviceType, MeshSpec
from ..errors import ConfigError
from .traffic import Traffic


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
    """This rank's axes."""

    spec: MeshSpec
    dp: MeshAxis
    cfg: MeshAxis
    patch: MeshAxis
    ring: MeshAxis
    ulysses: MeshAxis
    tp: MeshAxis

    @property
    def axes(self) -> list[MeshAxis]:
        return [getattr(self, axis) for axis in AXES]

    @property
    def sp_degree(self) -> int:
        return self.ring.degree * self.ulysses.degree

    @property
    def sp_rank(self) -> int:
        """Position in the token order: ring is outer, ulysses inner."""
        return self.ring.rank * self.ulysses.degree + self.ulysses.rank


def build_mesh(spec: MeshSpec, device: DeviceType) -> Mesh:
    """The mesh of `spec` over the whole world.

    Raises: ConfigError: the product of degrees is not the world's size.
    Comm: one group creation per axis of degree 2 or more; every rank must call this in the same order.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    spec.check_world(world_size)
    if world_size == 1:
        return Mesh(spec, **{axis: MeshAxis(axis) for axis in AXES})
    shape = tuple(getattr(spec, axis) for axis in spec.order)
    device_mesh = init_device_mesh(device, shape, mesh_dim_names=spec.order)
    axes = {}
    for axis in AXES:
        degree = getattr(spec, axis)
        group = device_mesh.get_group(axis) if degree > 1 else None
        axes[axis] = MeshAxis(axis, degree, device_mesh.get_local_rank(axis), group)
    return Mesh(spec, **axes)


class BandAxes:
    """Axes over the first k ranks of the world, for images with fewer rows than there are ranks."""

    def __init__(self) -> None:
        self._axes: dict[int, MeshAxis] = {}
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def first(self, degree: int) -> MeshAxis | None:
        """The axis over ranks 0 to degree - 1; None on a rank beyond it.

        Comm: a group creation at the first use of a degree; every rank of the world must call this.
        """
        if not 1 <= degree <= self.world_size:
            raise ConfigError(
                f"{degree} bands can't be spread over {self.world_size} ranks.", "Use at most one band a rank."
            )
        rank = dist.get_rank() if dist.is_initialized() else 0
        if degree not in self._axes:
            group = dist.new_group(list(range(degree))) if degree > 1 else None
            self._axes[degree] = MeshAxis("band", degree, rank, group)
        return self._axes[degree] if rank < degree else None
