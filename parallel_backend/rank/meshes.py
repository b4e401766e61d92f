"""The meshes of a rank's models, and the bands of its VAEs: whom it talks to, and over which groups."""

from __future__ import annotations

from collections.abc import Container

import torch

from ..config import MeshSpec
from ..distributed.mesh import BandAxes, Groups, Mesh, build_mesh
from ..distributed.warm_up import warm_up


class Meshes(Container[MeshSpec]):
    """Each is kept while a model of it is loaded or resident."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._groups = Groups()
        self.bands = BandAxes(self._groups)
        self._meshes: dict[MeshSpec, Mesh] = {}
        self._joining: MeshSpec | None = None

    def __contains__(self, spec: object) -> bool:
        return spec in self._meshes

    @property
    def place(self) -> list[int]:
        """How many collectives this rank has started, by axis: alike on ranks that stand at the same place."""
        meshes = list(self._meshes.values())  # another thread may be looking
        return [axis.traffic.collectives for mesh in meshes for axis in mesh.counted] + [self.bands.traffic.collectives]

    def join(self, spec: MeshSpec) -> Mesh:
        """That mesh, for a model on its way in; `joined` ends the way.

        Comm: where it is new, the groups and the communicators of all its axes are made.
        """
        self._joining = spec
        if spec not in self._meshes:
            self._meshes[spec] = build_mesh(spec, self._groups)
            warm_up(self._meshes[spec], self._device)
        return self._meshes[spec]

    def joined(self) -> None:
        self._joining = None

    def keep_only(self, specs: set[MeshSpec], *, bands: bool) -> None:
        """The groups of others are let go of, and those of bands: a communicator takes up to hundreds of MB of a GPU."""
        used = specs | {self._joining}
        self._meshes = {spec: mesh for spec, mesh in self._meshes.items() if spec in used}
        self._groups.keep_only(list(self._meshes.values()), bands)
