"""What a PARALLEL_MESH link carries: settings, and the connection to the backend that they name."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_management as mm
from comfy_api.latest import io

from ..parallel_backend import Backend, MeshSpec
from ..parallel_backend.config import MMDIT_REST, UNET_REST, BackendSpec
from ..parallel_backend.rpc.messages import RankState
from ..parallel_backend.rpc.runtime_dir import machine
from .node_text import say

# Core has a socket named MESH, for 3D shapes.
MeshSocket = io.Custom("PARALLEL_MESH")
# Left free for activations beside the weights, and for what other programs take meanwhile.
ACTIVATION_BYTES = 1536 * 2**20


class ParallelMesh:
    """Immutable but for the connection, which is made at first use and kept as long as ComfyUI keeps this."""

    def __init__(
        self,
        spec: BackendSpec,
        degrees: Mapping[str, int],
        dtype: str,
        kernel: str,
        sliced: bool = False,
        compile: bool = False,
    ) -> None:
        """`degrees` of 0 are left open; `sliced` is of UNets. Raises: ConfigError: they don't fit the ranks."""
        self.spec, self.degrees, self.dtype, self.kernel, self.compile = spec, degrees, dtype, kernel, compile
        self.mmdit, self.unet = self._filled(MMDIT_REST), self._filled(UNET_REST, sliced)
        self._backend: Backend | None = None

    def _filled(self, rest: str, sliced: bool = False) -> MeshSpec:
        """The mesh in which the axis `rest` takes the ranks that nothing was said of."""
        return MeshSpec.filled(self.spec.world_size, rest, sliced=sliced, **self.degrees)

    def backend(self) -> Backend:
        """The running backend, or one started now; an interrupt in ComfyUI ends the wait.

        Raises: ConfigError, StartError, BackendLostError.
        """
        if self._backend is None and self.spec.address:
            self._backend = Backend.attach_remote(self.spec.address, self.spec.keys, self.spec.world_size)
        if self._backend is None:

            def waiting(seconds: float) -> None:
                mm.throw_exception_if_processing_interrupted()
                say(f"starting backend {self.spec.name!r}: {self.spec.world_size} ranks, {seconds:.0f} s")

            self._backend = Backend.attach_or_start(
                self.spec.world_size,
                self.spec.device,
                self.spec.name,
                devices=self.spec.devices,
                idle_seconds=self.spec.idle_seconds,
                memory_budget=self.spec.memory_budget,
                waiting=waiting,
            )
        return self._backend

    def describe(self) -> str:
        where = ",".join(map(str, self.spec.devices)) or "all"
        place = f"cuda {where}" if self.spec.device == "cuda" else "cpu"
        place = self.spec.address or place
        mesh = self.mmdit.describe()
        if self.unet != self.mmdit:
            mesh += f" (UNet: {self.unet.describe()})"
        return f"{self.spec.world_size} ranks on {place}: {mesh}, {self.dtype}"


def make_room(backend: Backend, rank_bytes: int) -> str:
    """ComfyUI's own models leave GPUs that they share with a rank, where the rank lacks room for `rank_bytes`.

    Returns: what was done, for the node to show; empty where nothing was needed.
    """
    short = [rank for rank in backend.status().ranks if lacks_room(rank, rank_bytes)]
    if not short or not mm.loaded_models():
        return ""
    mm.unload_all_models()
    mm.soft_empty_cache()
    needed = (rank_bytes + ACTIVATION_BYTES) / 2**20
    places = ", ".join(f"rank {rank.rank} on {rank.device} ({rank.free_bytes / 2**20:.0f} MiB free)" for rank in short)
    return f"unloaded ComfyUI's own models: {needed:.0f} MiB are needed for {places}"


def lacks_room(rank: RankState, rank_bytes: int) -> bool:
    """On the GPU that ComfyUI computes on; what it holds elsewhere is not in the way of a rank."""
    here = rank.machine == machine() and rank.device == own_device()
    return here and rank.device.startswith("cuda") and rank.free_bytes < rank_bytes + ACTIVATION_BYTES


def own_device() -> str:
    """What ComfyUI computes on, as ranks name theirs."""
    return str(mm.get_torch_device())
