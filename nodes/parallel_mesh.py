"""What a PARALLEL_MESH link carries: settings, and the connection to the backend that they name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import comfy.model_management as mm
from comfy_api.latest import io

from ..parallel_backend import Backend, MeshSpec
from ..parallel_backend.client.cards import seen
from ..parallel_backend.client.gpu_environment import difference
from ..parallel_backend.config import AUTO, MMDIT_REST, UNET_REST, BackendSpec
from ..parallel_backend.errors import BackendInUseError, CancelledError, ConfigError
from ..parallel_backend.mesh_choice.choice import default_mesh
from ..parallel_backend.mesh_choice.displaced import can_displace, displaced_mesh
from ..parallel_backend.rpc.messages import ModelKind
from .hung.displaced_steps import Displaced
from .node_text import say

# Degrees that 0 leaves open; of the others 1 is what they are where nobody has asked for more.
OPEN = ("dp", "cfg", "ulysses", "patch")
# Core has a socket named MESH, for 3D shapes.
MeshSocket = io.Custom("PARALLEL_MESH")


def optional_mesh(what: str) -> Any:
    """The input of a node that works without one too; `what` the mesh decides there."""
    return MeshSocket.Input(
        "mesh", optional=True, tooltip=f"{what} From Mesh Config; left open, its defaults: all GPUs, an exact split."
    )


class ParallelMesh:
    """Immutable but for the connection, which is made at first use and kept as long as ComfyUI keeps this.

    `attached` are the connections that ComfyUI, or what it keeps of their models, still has. `refused`: by name of the backend,
    what was asked for last of one that is otherwise and in use, until it is there.
    """

    attached: ClassVar[WeakSet[Backend]] = WeakSet()
    refused: ClassVar[dict[str, BackendSpec]] = {}

    def __init__(
        self,
        spec: BackendSpec,
        degrees: Mapping[str, int],
        dtype: str,
        kernel: str,
        sliced: bool = False,
        compile: bool = False,
        note: str = "",
        nan_is_error: bool = False,
        graphs: bool = False,
        displaced: Displaced | None = None,
    ) -> None:
        """`degrees` of 0 are left open; `sliced` is of UNets; `note` tells of the GPUs, `notes` of what was chosen where a degree
        is open, by kind of model. `displaced`: what its MODELs ask for.

        Raises: ConfigError: they don't fit the ranks, or no kind of model has displaced steps on them.
        """
        self.spec, self.degrees, self.dtype, self.kernel, self.compile = spec, degrees, dtype, kernel, compile
        self.nan_is_error, self.graphs, self.displaced = nan_is_error, graphs, displaced
        self.mmdit, mmdit_note = self._filled("mmdit", MMDIT_REST)
        self.unet, unet_note = self._filled("unet", UNET_REST, sliced)
        self.note, self.notes = note, {"mmdit": mmdit_note, "unet": unet_note}
        if displaced and not (can_displace(self.mmdit, "mmdit") or can_displace(self.unet, "unet")):
            raise ConfigError(
                f"Displaced steps need two or more ranks on pp or ring (MMDiT) or patch (UNet); the mesh is {self.mmdit.describe()}.",
                "Set method to exact in Mesh Config, or leave ranks for such an axis: more of them, or cfg 1.",
            )
        self._backend: Backend | None = None

    def check_displaced(self, kind: ModelKind) -> None:
        """Raises: ConfigError: displaced steps are asked for, and such a model has none in its mesh."""
        mesh = self.unet if kind == "unet" else self.mmdit
        if self.displaced is None or can_displace(mesh, kind):
            return
        what, axes = ("A UNet", "patch") if kind == "unet" else ("An MMDiT", "pp or ring")
        raise ConfigError(
            f"{what} has displaced steps on two or more {axes} ranks; its mesh is {mesh.describe()}.",
            f"Set method to exact in Mesh Config; or {axes} to 2 or more, with as many ranks.",
        )

    def _filled(self, kind: str, rest: str, sliced: bool = False) -> tuple[MeshSpec, str]:
        """The mesh in which the axis `rest` takes the ranks that nothing was said of, and what to tell of it.

        Where no degree was asked for, it is as many ranks as a picture is worth. For displaced steps it is an axis that has them.
        """
        if self.displaced is not None:
            choice = displaced_mesh(self.spec.world_size, kind, self.degrees, sliced=sliced)
            return choice.mesh, choice.note
        if not sliced and all(degree == (axis not in OPEN) for axis, degree in self.degrees.items()):
            choice = default_mesh(self.spec.world_size, kind, self.spec.device, graphs=self.graphs)
            return choice.mesh, choice.note
        return MeshSpec.filled(self.spec.world_size, rest, sliced=sliced, **self.degrees), ""

    def backend(self) -> Backend:
        """The running backend, or one started now; an interrupt in ComfyUI ends the wait.

        Raises: ConfigError, StartError, BackendLostError, BackendInUseError.
        """
        with self.noting_refusals(self.spec):
            backend = self._connected()
        self.attached.add(backend)
        return backend

    @classmethod
    @contextmanager
    def noting_refusals(cls, spec: BackendSpec) -> Iterator[None]:
        """What is asked of a backend inside asks for it as `spec` says."""
        try:
            yield
        except BackendInUseError:
            cls.refused[spec.name] = spec
            raise
        if cls.refused.get(spec.name) == spec:
            del cls.refused[spec.name]

    def _connected(self) -> Backend:
        if self._backend is not None:
            try:  # another workflow may have had it restarted, or have given it another budget
                self._backend.follow_restarts(mm.processing_interrupted)
            except CancelledError:
                mm.throw_exception_if_processing_interrupted()
                raise
            self._backend.adjust()
        elif self.spec.address:
            self._backend = Backend.attach_remote(self.spec.address, self.spec.keys, self.spec.world_size)
        else:

            def waiting(seconds: float, what: str) -> None:
                mm.throw_exception_if_processing_interrupted()
                say(f"starting backend {self.spec.name!r}: {self.spec.world_size} ranks: {what}, {seconds:.0f} s")

            self._backend = Backend(
                self.spec.world_size,
                self.spec.device,
                self.spec.name,
                devices=self.spec.devices,
                idle_seconds=self.spec.idle_seconds,
                memory_budget=self.spec.memory_budget,
                waiting=waiting,
            )
        self._backend.on_progress = lambda event: say(event.text)
        return self._backend

    def places(self) -> list[str]:
        """What each rank runs on, as far as that is known here: "cuda 3"; of a backend elsewhere nothing is."""
        if self.spec.address:
            return []
        if self.spec.device == "cpu":
            return ["cpu"] * self.spec.world_size
        return [f"cuda {number}" for number in self.spec.devices or range(self.spec.world_size)]

    def describe(self) -> str:
        where = ",".join(map(str, self.spec.devices or range(self.spec.world_size)))
        place = f"cuda {where}" if self.spec.device == "cuda" else "cpu"
        place = self.spec.address or place
        mesh = self.mmdit.describe()
        if self.unet != self.mmdit:
            mesh += f" (UNet: {self.unet.describe()})"
        dtype = "dtype auto" if self.dtype == AUTO else self.dtype
        how = f", displaced after {self.displaced.warmup_steps} exact steps" if self.displaced else ""
        first = f"{self.spec.world_size} ranks on {place}: {mesh}, {dtype}{how}"
        return "\n".join(filter(None, [first, self.note, *self.notes.values()]))

    def differs(self) -> str:
        """What has changed of the backend for this mesh, told once, and what it was started with otherwise than ComfyUI."""
        backend = self._backend or self.backend()  # asked for once a load: each time takes settings over
        if self.spec.address:
            return backend.taken_notes()
        cards = [card.uuid for card in seen(self.spec.device).cards]
        other = " ".join(difference(self.spec.name, backend.record, os.environ, cards) or ())
        return "\n".join(filter(None, [backend.taken_notes(), other]))
