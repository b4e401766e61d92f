"""Steps on H100s predicted from what was measured on one, for whom has none at hand: the shipped tables of meshes are made of it.

Measured (benchmarks/RESULTS.md, "On one GPU", bfloat16, 1024 pixels): evaluations of SDXL and SD3.5-Large, eager and as one
graph, and the share of the time in which a kernel runs. Counted (tests/fake_cuda/budgets.py): launches and messages. From the
review of the GPU path: what ulysses copies and modulations cost. All times are milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config import MeshSpec
from ..mesh_choice.tables import Row, Table
from .links import Link, stated

BASIS = "predicted for H100s on NVLink 4 from one H100's figures (benchmarks/RESULTS.md, 2026-11-27)"
SIZE = 1024
RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
# Of that host's Python: SDXL's one row, then of 1634 launches, took 51.8 ms, a band of 3035 92.3.
LAUNCH = 0.031
# Of an evaluation as it is launched now.
SDXL_LAUNCHES, BAND_LAUNCHES = 1480, 1690
LARGE_LAUNCHES, ULYSSES_LAUNCHES = 810, 840


@dataclass(frozen=True)
class Cost:
    """Of one rank's evaluation: the GPU's time and Python's, messages, the MB that it sends in them, and between how many ranks."""

    gpu: float
    host: float
    messages: int
    megabytes: float
    degree: int

    def step(self, link: Link, graphs: bool) -> float:
        """Messages are exposed; Python's time runs beside the GPU's, and the longer of both is the step's."""
        speed = link.of("gather")
        sent = self.messages * link.waits("gather", self.degree) + self.megabytes * 1e6 / speed.bandwidth
        host = 0.0 if graphs else self.host + self.messages * link.call * 1e3
        return max(self.gpu + sent * 1e3, host)


def sdxl(mesh: MeshSpec, graphs: bool) -> Cost:
    """Bands: between the measured whole row (24.9 ms of kernels, 26.9 as a graph) and a band of four (8.3 and 15.7)."""
    rows, bands = 2 // mesh.cfg, mesh.patch
    whole, four = (26.9, 15.7) if graphs else (24.9, 8.3)
    fixed = (4 * four - whole) / 3
    both = (43.8 if graphs else 37.8) / whole if rows == 2 else 1.0
    gpu = (fixed + (whole - fixed) / bands) * both
    # 10 attentions of 4096 tokens of 640, 60 of 1024 of 1280, in half precision: tokens for heads and back, or keys and values to all.
    tokens, by_heads = (10 * 4096 * 640 + 60 * 1024 * 1280) * 2 / 1e6 / bands, bands > 2
    sent = tokens * (bands - 1) * (4 / bands if by_heads else 2) * rows
    messages = (52 + 70 * (1 + by_heads)) * (bands > 1) + (mesh.cfg > 1)
    launches = BAND_LAUNCHES if bands > 1 else SDXL_LAUNCHES
    return Cost(gpu, launches * LAUNCH, messages, sent, max(bands, mesh.cfg))


def sd35_large(mesh: MeshSpec, graphs: bool) -> Cost:
    """Ulysses: products and attention are split, modulations (1.8 ms) are not; packing takes 3.5 ms on four ranks."""
    rows, degree, depth, tokens, hidden = 2 // mesh.cfg, mesh.ulysses, 38, 4250, 2432
    gpu = 1.8 + (149.2 if graphs else 151.3 - 1.8) * rows / 2 / degree + (14.0 / degree * rows if degree > 1 else 0.0)
    sent = 4 * (degree - 1) / degree * depth * tokens / degree * hidden * 2 * rows / 1e6
    launches = LARGE_LAUNCHES if degree == 1 else ULYSSES_LAUNCHES
    return Cost(gpu, launches * LAUNCH, (degree > 1) * 77 + (mesh.cfg > 1), sent, max(degree, mesh.cfg))


_COSTS: dict[str, tuple[str, str, Callable[[MeshSpec, bool], Cost]]] = {
    "mmdit": ("sd3.5-large", "ulysses", sd35_large),
    "unet": ("sdxl", "patch", sdxl),
}


def tables() -> list[Table]:
    """Of each kind of model, eager and as CUDA graphs: the fastest mesh of each number of ranks."""
    link, found = stated("nvlink4"), []
    for kind, (layout, rest, cost) in _COSTS.items():
        for graphs in (False, True):
            rows = []
            for ranks in RANKS:
                meshes = [{rest: ranks}] if ranks % 2 else [{"cfg": 2, rest: ranks // 2}, {rest: ranks}]
                steps = [(cost(MeshSpec(**m), graphs).step(link, graphs), m) for m in meshes]  # type: ignore[arg-type]
                # cfg sends next to nothing: other axes must gain more than the figures are good for.
                step, degrees = next(pair for pair in steps if pair[0] <= 1.02 * min(steps, key=lambda p: p[0])[0])
                rows.append(Row({axis: n for axis, n in degrees.items() if n > 1}, round(step / 1e3, 5)))
            found.append(Table("cuda", kind, graphs, SIZE, layout, BASIS, rows))
    return found


def printed(of: Sequence[Table]) -> str:
    """Milliseconds of a step of the fastest mesh of each number of ranks."""
    lines = [BASIS, "", "| model | ranks | mesh | ms a step |", "|---|---|---|---|"]
    for table in of:
        name = f"{table.layout}{', as CUDA graphs' * table.graphs}, {table.size} x {table.size} pixels"
        lines += [
            f"| {name} | {row.mesh.world_size} | {row.mesh.describe()} | {row.step * 1e3:.1f} |" for row in table.rows
        ]
    return "\n".join(lines)
