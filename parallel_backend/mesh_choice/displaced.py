"""The mesh of a model whose steps are to be displaced: one of its axes is of those on which they can be."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import MMDIT_REST, UNET_REST, MeshSpec
from ..errors import ConfigError
from .choice import Choice

# On which axes ranks can go on with what the others had a step ago, by kind of model. The first takes the ranks that nothing was
# said of: an MMDiT's stages keep nearer to exact pictures than its ring, send least and hold least.
DISPLACED_AXES = {"mmdit": ("pp", "ring"), "unet": ("patch",)}


def can_displace(mesh: MeshSpec, kind: str) -> bool:
    """Whether ranks of this mesh have anything that could be a step old."""
    return any(getattr(mesh, axis) > 1 for axis in DISPLACED_AXES[kind])


def displaced_mesh(world_size: int, kind: str, degrees: Mapping[str, int], *, sliced: bool = False) -> Choice:
    """A mesh of these degrees with an axis that can be displaced, where there is one; else the exact one, of which
    `can_displace` tells that it has none.

    All ranks work on one picture: what the tables predict is of exact steps.

    Args:
        kind: mmdit or unet.
        degrees: of each axis; 0 leaves it open. pp 1 and ring 1 of an MMDiT leave pp open. Where cfg is open it is 2 as long as
            that leaves an axis to displace.
    Raises: ConfigError: the degrees don't fit `world_size` ranks.
    """
    rest = {"mmdit": MMDIT_REST, "unet": UNET_REST}[kind]
    opened, note = dict(degrees), ""
    if kind == "mmdit" and all(degrees[axis] == 1 for axis in DISPLACED_AXES[kind]):
        opened, rest = opened | {"pp": 0, "ulysses": degrees["ulysses"] or 1}, "pp"
        note = (
            "MMDiT: displaced steps on pp, where nothing was said of it (PipeFusion). For ControlNets, RescaleCFG and samplers of "
            "several evaluations a step, set ring in its place."
        )
    for cfg in [degrees["cfg"]] if degrees["cfg"] else [2, 1]:
        try:
            mesh = MeshSpec.filled(world_size, rest, sliced=sliced, **(opened | {"cfg": cfg}))
        except ConfigError:
            continue  # said below, of the degrees as they were given
        if can_displace(mesh, kind):
            return Choice(mesh, note)
    usual = MMDIT_REST if kind == "mmdit" else UNET_REST
    return Choice(MeshSpec.filled(world_size, usual, sliced=sliced, **degrees))
