"""MeshConfig: how many ranks, and how they share the work."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..parallel_backend.client.cards import Ranks, choose_ranks, seen
from ..parallel_backend.client.names import backend_name
from ..parallel_backend.config import AUTO, BackendSpec, choose, gpu_numbers
from ..parallel_backend.errors import ConfigError
from .hung.displaced_steps import Displaced
from .known_to_core import search_aliases
from .mesh_inputs import DISPLACED, EXACT, mesh_inputs
from .node_text import say
from .parallel_mesh import MeshSocket, ParallelMesh


def parallel_mesh(
    ranks: int,
    method: str,
    dtype: str,
    warmup_steps: int,
    cfg: int,
    ulysses: int,
    ring: int,
    tp: int,
    pp: int,
    patch: int,
    sliced: bool,
    dp: int,
    device: str,
    devices: str,
    attention: str,
    compile: bool,
    graphs: bool,
    nan_is_error: bool,
    memory_budget_mib: int,
    idle_minutes: int,
    backend: str,
    address: str,
    keys: str,
) -> ParallelMesh:
    """The settings as one object.

    Raises: ConfigError: they don't fit together.
    """
    choose(method, (EXACT, DISPLACED), "Method")
    displaced = Displaced(warmup_steps, by_mesh=True) if method == DISPLACED else None
    ordinals = gpu_numbers(devices)
    asked: Any = None if device == AUTO else device
    if address and ordinals:
        raise ConfigError(f"devices={devices!r} can't be chosen at {address}.", "Leave devices empty: serve has them.")
    if address and not ranks:
        raise ConfigError(
            f"How many ranks the backend at {address} has is not known here.", "Set ranks to their number."
        )
    if address:
        chosen = Ranks(asked or "cuda", ranks)  # what is there is known once it answers
    else:
        here = seen(asked)
        chosen = choose_ranks(here, asked, ranks, ordinals)
        backend = backend_name(backend, chosen.device, here)
    limits = (idle_minutes * 60.0, memory_budget_mib * 2**20)
    spec = BackendSpec(backend, chosen.count, chosen.device, chosen.devices, *limits, address, keys)
    degrees = {"dp": dp, "cfg": cfg, "pp": pp, "patch": patch, "ring": ring, "ulysses": ulysses, "tp": tp}
    how: dict[str, Any] = {"compile": compile, "graphs": graphs, "nan_is_error": nan_is_error}
    return ParallelMesh(spec, degrees, dtype, attention, sliced, note=chosen.note, displaced=displaced, **how)


def mesh_of(**settings: Any) -> ParallelMesh:
    """What Mesh Config's inputs come to, those that are not given as they are when it is put down.

    Raises: ConfigError: a number outside of its input's bounds; as `parallel_mesh`.
    """
    inputs = mesh_inputs()
    values = {setting.id: setting.default for setting in inputs} | settings
    for setting in inputs:
        # Core holds none of the inputs to them that validate_inputs names.
        if isinstance(setting, io.Int.Input) and not setting.min <= values[setting.id] <= setting.max:
            given = f"{setting.id}={values[setting.id]}"
            raise ConfigError(f"{given} is not possible in Mesh Config.", f"Give {setting.min} to {setting.max}.")
    return parallel_mesh(**values)


def default_mesh() -> ParallelMesh:
    """Mesh Config as it is when it is put down: all GPUs, an exact split. Raises: as `parallel_mesh`."""
    return mesh_of()


class MeshConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MeshConfig",
            display_name="Parallel GPUs (Mesh Config)",
            category="parallel",
            description="Says how many GPUs work on one image and how they share it. "
            "Left as it is, it takes all GPUs and an exact split over as many of them as make an image of 1024 x 1024 pixels faster.",
            **search_aliases(
                "multi gpu", "gpu", "parallel", "mesh config", "tensor parallel", "ulysses", "ring attention"
            ),
            inputs=mesh_inputs(),
            outputs=[MeshSocket.Output(display_name="mesh", tooltip="For the parallel loaders.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        ranks: Any = ...,
        method: Any = ...,
        cfg: Any = ...,
        ulysses: Any = ...,
        ring: Any = ...,
        tp: Any = ...,
        pp: Any = ...,
        patch: Any = ...,
        sliced: Any = ...,
        dp: Any = ...,
        device: Any = ...,
        devices: Any = ...,
        address: Any = ...,
        keys: Any = ...,
    ) -> bool:
        """Of inputs that the prompt gives; the others are as when the node is put down."""
        given = {name: value for name, value in locals().items() if name != "cls" and value is not ...}
        if None in given.values():  # a linked value is known only when the node runs
            return True
        # Raised, not returned: ComfyUI would repeat a returned text for each of these inputs.
        mesh_of(**given)
        return True

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        mesh = mesh_of(**settings)
        say(mesh.describe(), log=True)
        return io.NodeOutput(mesh)
