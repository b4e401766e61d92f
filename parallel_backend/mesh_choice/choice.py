"""The mesh that a model gets where nobody has asked for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import MMDIT_REST, UNET_REST, MeshSpec
from .tables import Row, Table, shipped

# Pixels of the pictures that these models are made for: a mesh is chosen when a model is loaded, before any size is known.
USUAL_SIZE = 1024
# So many times faster than on fewer ranks a picture must be predicted to be on more: figures are no better than that.
WORTH = 1.05
# Guidance's branches apart send next to nothing, and gain more on slower cards than the tables' are: they need not be faster, as
# long as they are slower by less than figures can tell.
FREE, EVEN = {"cfg": 2}, 0.98


@dataclass(frozen=True)
class Choice:
    """A mesh of all ranks, and what to tell of it where a single picture leaves some of them idle."""

    mesh: MeshSpec
    note: str = ""


def default_mesh(
    world_size: int,
    kind: str,
    device: str,
    *,
    graphs: bool = False,
    size: int = USUAL_SIZE,
    tables: Sequence[Table] | None = None,
) -> Choice:
    """As many ranks on a picture as make it faster, by the tables; what is left over computes other pictures of a batch (dp).

    Where the tables say nothing of so many ranks: cfg 2 where it fits, the rest ulysses, or bands for a UNet.

    Args:
        kind: mmdit or unet.
        graphs: evaluations are CUDA graphs.
    """
    table = _nearest(shipped() if tables is None else tables, device, kind, graphs, size)
    rows = {row.mesh.world_size: row for row in table.rows} if table is not None else {}
    if table is None or (world_size not in rows and world_size < max(rows, default=0)):
        return Choice(MeshSpec.exact_default(world_size, UNET_REST if kind == "unet" else MMDIT_REST))
    best = _worth([rows[count] for count in sorted(rows) if world_size % count == 0])
    count = best.mesh.world_size
    if count == world_size:
        return Choice(best.mesh)
    mesh = MeshSpec(dp=world_size // count, **best.degrees)  # type: ignore[arg-type]
    note = _idle(table, count, world_size)
    if device == "cuda" and not graphs:
        with_graphs = default_mesh(world_size, kind, device, graphs=True, size=size, tables=tables).mesh
        if with_graphs.dp < mesh.dp:
            note += " With graphs on (Mesh Config) more of them are predicted to pay."
    return Choice(mesh, note)


def _worth(rows: Sequence[Row]) -> Row:
    """The fastest, less ranks that gain next to nothing. The first is of one rank."""
    best = rows[0]
    for row in rows[1:]:
        if row.step * (EVEN if row.degrees == FREE else WORTH) <= best.step:
            best = row
    return best


def _nearest(tables: Sequence[Table], device: str, kind: str, graphs: bool, size: int) -> Table | None:
    own = [t for t in tables if (t.device, t.kind, t.graphs) == (device, kind, graphs)]
    return min(own, key=lambda table: abs(table.size - size), default=None)


def _idle(table: Table, count: int, world_size: int) -> str:
    what = "UNet" if table.kind == "unet" else "MMDiT"
    return (
        f"{what}: a picture is predicted to be no faster on more than {count} of {world_size} ranks "
        f"({table.size} x {table.size} pixels); the other {world_size - count} wait, or take a batch's other pictures (dp). "
        "Degrees of your own in Mesh Config put them to work on one."
    )
