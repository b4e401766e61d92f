"""`parallel-mmdit bench predict`: seconds of a step on 1, 2, 4, 8 ranks of each mesh, from one device.

A stand-in plays each rank of a mesh on the device at hand, with messages that take no time; the messages' times, on a link that
is stated or measured, are laid between what each rank computes, as the code orders them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import sched_getaffinity
from pathlib import Path

import torch

from ..client.cards import choose_ranks, seen
from ..client.links import measure_links
from ..config import DTYPES, MMDIT_AXES, MMDIT_REST, UNET_AXES, UNET_REST, BackendSpec, MeshSpec, choose
from ..errors import ConfigError
from ..mesh_choice.choice import WORTH
from ..mesh_choice.tables import Row, Table, write
from ..models.families import open_model
from ..small_checkpoints.mmdit import small_config, write_mmdit
from ..small_checkpoints.unet import small_unet_config, write_unet
from .layouts import LAYOUTS
from .links import MEASURED, NAMES, Link, from_times, stated
from .players import Play, on_cores, on_device
from .prediction_table import Predicted, fastest, median_of, predicted, table
from .random_model import random_model
from .stand_in import FIRST_STEPS, Run, Subject

COUNTED_STEPS = 3
SMALL_DEPTH, SMALL_HEADS, SMALL_WIDTHS = 6, 8, (96, 192, 384)
UNET = "sdxl"


@dataclass(frozen=True)
class Asked:
    """What is to be predicted. `model` None is random weights in the sizes of `layout`: the true ones on a GPU, small ones on a CPU.

    `meshes` takes the place of those that `gpus` gives.
    """

    layout: str
    model: Path | None
    device: str
    dtype: str
    size: int
    gpus: Sequence[int]
    meshes: Sequence[MeshSpec]
    displaced: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        choose(self.layout, tuple(LAYOUTS), "Layout")
        choose(self.dtype, DTYPES, "dtype")
        if self.size < 64 or self.size % 8:
            raise ConfigError(f"size={self.size} is not possible.", "Use a multiple of 8 pixels, 64 or more.")
        if bad := [count for count in self.gpus if not 1 <= count <= 64]:
            raise ConfigError(f"gpus={bad[0]} is not possible.", "Use 1 to 64.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("No GPU is here to play a rank.", "Leave device out, or use cpu.")
        if self.device == "cpu" and self.dtype != "float32":
            raise ConfigError(f"dtype={self.dtype} is for GPUs.", "Use float32 on a CPU.")
        if self.graphs and self.device == "cpu":
            raise ConfigError("A CPU has no CUDA graphs.", "Leave graphs out.")

    def runs(self, axes: Sequence[str]) -> list[Run]:
        """One for each mesh, and where displaced steps are asked for and the mesh has them, one more."""
        found = []
        for mesh in self.meshes or [mesh for count in self.gpus for mesh in candidates(count, axes)]:
            found.append(Run(mesh, self.size, steps=FIRST_STEPS + COUNTED_STEPS, graphs=self.graphs))
            if self.displaced and max(mesh.ring, mesh.pp, mesh.patch) > 1:
                patches, graphs = 2 * mesh.pp if mesh.pp > 1 else 0, self.graphs and mesh.pp == 1
                found.append(Run(mesh, self.size, 0, 2 + COUNTED_STEPS, 1, patches, graphs))
        return found


def candidates(count: int, axes: Sequence[str]) -> list[MeshSpec]:
    """Meshes of so many ranks that spread one picture: one axis alone, or after cfg=2."""
    found = [MeshSpec(cfg=2)] if count == 2 else []
    for axis in axes:
        if axis not in ("dp", "cfg") and count > 1:
            found += [MeshSpec(cfg=2, **{axis: count // 2})] if count % 2 == 0 and count > 2 else []  # type: ignore[arg-type]
            found.append(MeshSpec(**{axis: count}))  # type: ignore[arg-type]
    return found or [MeshSpec()]


def run_predict(asked: Asked, link: str, rounds: int = 1, defaults: Path | None = None) -> list[Predicted]:
    """Prints the table and the fastest mesh of each number of ranks; each mesh is played `rounds` times, in turn with the others.

    Args:
        defaults: a file of tables, into which the exact meshes go that are the fastest of as many ranks.
    Raises: BackendError: what is asked can't be had.
    """
    choose(link, NAMES, "Link")
    between = measured(asked.device) if link == MEASURED else stated(link)
    with player(asked) as (play, axes, name):
        found: dict[Run, list[Predicted]] = {run: [] for run in asked.runs(axes)}
        for _ in range(rounds):
            for run in list(found):
                try:
                    found[run].append(predicted(run, play(run), between))
                except ConfigError as error:
                    if run.mesh in asked.meshes:
                        raise
                    del found[run]
                    print(f"{run.mesh.describe()} is left out: {error.message}")
    rows = [median_of(of_mesh) for of_mesh in found.values()]
    place = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU, a core a rank"
    graphs = ", as CUDA graphs" if asked.graphs else ""
    title = f"Predicted: {name}, {asked.size} x {asked.size} pixels, guidance, {asked.dtype}{graphs}; {place}; link {between.name}"
    print(table(rows, title))
    for count, best in fastest(rows).items():
        print(f"\nfastest of {count}: {best.name}, {best.step:.4f} s a step", end="")
    print()
    if defaults is not None:
        write(defaults, [_defaults(asked, rows, title, "unet" if tuple(axes) == UNET_AXES else "mmdit")])
    return rows


def _defaults(asked: Asked, rows: Sequence[Predicted], basis: str, kind: str) -> Table:
    """Of exact meshes of cfg and the axis that open ranks go to: the others are for who knows why, as weights that don't fit."""
    rest = UNET_REST if kind == "unet" else MMDIT_REST
    usual = [r for r in rows if not r.displaced and r.mesh.world_size == r.mesh.cfg * getattr(r.mesh, rest)]
    quickest = fastest(usual)
    # In the order of candidates, in which cfg, which sends least, comes first.
    near = [row for row in usual if row.step <= WORTH * quickest[row.mesh.world_size].step]
    best = {row.mesh.world_size: row for row in reversed(near)}
    degrees = {count: {axis: n for axis, n in best[count].mesh.degrees.items() if n > 1} for count in sorted(best)}
    ordered = [Row(degrees[count], round(best[count].step, 5)) for count in degrees]
    layout = asked.layout if asked.model is None else asked.model.name
    return Table(asked.device, kind, asked.graphs, asked.size, layout, basis, ordered)


def measured(device: str) -> Link:
    """The link between the ranks that this machine would have. Raises: ConfigError: it has one device. StartError: they don't meet."""
    ranks = choose_ranks(seen("cpu" if device == "cpu" else None), "cpu" if device == "cpu" else "cuda")
    if ranks.count < 2:
        raise ConfigError("One GPU has no link to measure.", f"Name one of {', '.join(NAMES[:-1])}.")
    return from_times(
        measure_links(BackendSpec("predict", ranks.count, ranks.device, ranks.devices)), ranks.count, device
    )


@contextmanager
def player(asked: Asked) -> Iterator[tuple[Play, Sequence[str], str]]:
    """Who plays ranks of the model that is asked for, the model's axes and its name."""
    if asked.device == "cuda":
        device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, asked.dtype)
        opened = open_model(asked.model) if asked.model else random_model(LAYOUTS[asked.layout], device, dtype)
        yield on_device(Subject(opened, device, dtype)), opened.kind.axes, opened.config.family
        return
    with small_model(asked.layout, asked.model, asked.size) as path, on_cores(path, cores()) as play:
        is_unet = asked.layout == UNET if asked.model is None else open_model(path).kind.name == "unet"
        name = asked.model.name if asked.model else f"a small {asked.layout}"
        yield play, UNET_AXES if is_unet else MMDIT_AXES, name


def cores() -> int:
    return len(sched_getaffinity(0))


@contextmanager
def small_model(layout: str, given: Path | None, size: int) -> Iterator[Path]:
    """A file with random weights of that layout, small enough for a CPU; or the file that was given."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="parallel-mmdit-predict-") as folder:
        path = Path(folder) / f"{layout}.safetensors"
        if layout == UNET:
            yield write_unet(path, small_unet_config(SMALL_WIDTHS))
            return
        yield write_mmdit(path, small_config(layout, SMALL_DEPTH, SMALL_HEADS, max(64, size // 16)))
