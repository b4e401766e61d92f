"""LoadParallelMMDiT and LoadParallelUNet: a checkpoint into the backend, a MODEL out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..parallel_backend import MeshSpec, RemoteModel
from ..parallel_backend.checkpoint_files.diffusion_part import diffusion_bytes
from ..parallel_backend.demo.files import MMDIT_FILE, UNET_FILE, DemoFile
from ..parallel_backend.rpc.messages import LoadModel, ModelKind, Progress, StepDone
from .core_dtype import computing_dtype, fp8_products, weights_dtype
from .core_memory import bytes_here, interruptible, make_room
from .demo_size import demo_size
from .hung.displaced_steps import as_mesh_asks
from .known_to_core import search_aliases
from .loader_file import leave
from .model_files import fingerprint, listed_elsewhere, names_in, path_of, taken_for, validity
from .node_text import say
from .parallel_mesh import MeshSocket, ParallelMesh
from .remote_model import RemotePatcher, remote_patcher

FOLDER = "diffusion_models"


def parallel_model(
    mesh: ParallelMesh, kind: ModelKind, path: Path, name: str = "", options: Mapping[str, Any] | None = None
) -> tuple[RemotePatcher, str]:
    """A MODEL of that file in the backend, and lines about how it came there.

    Args:
        name: what a backend elsewhere calls the file.
        options: what a loader of ComfyUI's was told: its dtype is taken where the mesh leaves that open.
    Raises: CheckpointError: not a model of that kind. ConfigError: the mesh asks for displaced steps that this kind has none of
        in it.
    """
    mesh.check_displaced(kind)
    remote, report = load_remote_model(mesh, kind, path, name, options or {})
    patcher = as_mesh_asks(remote_patcher(remote, path, bytes_here(remote)), mesh.displaced)
    leave(patcher, comfy.sd.load_diffusion_model, (str(path), dict(options or {})))
    return patcher, report


def load_remote_model(
    mesh: ParallelMesh, kind: ModelKind, path: Path, name: str, options: Mapping[str, Any]
) -> tuple[RemoteModel, str]:
    """The model in the backend, and lines about how it came there; the rest as for `parallel_model`."""
    backend, degrees = mesh.backend(), mesh.unet if kind == "unet" else mesh.mmdit
    dtype, unheeded = weights_dtype(mesh.dtype, mesh.compile, options)
    how = {"kind": kind, "compile": mesh.compile, "graphs": mesh.graphs}
    settings = {**how, "computes": computing_dtype(dtype), **fp8_products(options)}
    load = backend.asked(path, degrees, dtype, mesh.kernel, name, **settings)
    room = make_room(backend, _most_bytes(path, degrees, load), f"{load.held_as}{degrees.describe()}/")
    bar = comfy.utils.ProgressBar(1)

    def on_event(event: Progress | StepDone, _: Sequence[Tensor]) -> None:
        if isinstance(event, Progress):
            bar.update_absolute(event.done, event.total)

    remote = interruptible(backend, backend.load_asked, load, on_event=on_event)
    bar.update_absolute(1, 1)
    remote.nan_is_error = mesh.nan_is_error
    return remote, "\n".join(filter(None, [load_report(remote), mesh.notes[kind], *unheeded, room, mesh.differs()]))


def _most_bytes(path: Path, degrees: MeshSpec, load: LoadModel) -> int:
    """About what a rank holds of it, or more."""
    shared = degrees.tp * degrees.pp * (degrees.cfg * degrees.patch if degrees.sliced else 1)
    if load.weights:  # scales, and the layers by which latents come in and go out, are of more bytes
        return diffusion_bytes(path, 1) * 21 // 20 // shared
    return diffusion_bytes(path, getattr(torch, load.dtype).itemsize) // shared


def load_report(remote: RemoteModel) -> str:
    loaded = remote.loaded
    held = f"{per_rank(loaded.resident_bytes)} MiB held, in {remote.load.dtype}"
    if not any(loaded.bytes_read):
        text = f"{loaded.family}: weights already resident, 0 bytes read; {held}"
    else:
        text = f"{loaded.family}: {per_rank(loaded.bytes_read)} MiB read in {loaded.seconds:.1f} s, {held}"
    text += f"; made room by freeing {', '.join(loaded.evicted)}" if loaded.evicted else ""
    return "\n".join([text, *loaded.notes])


def per_rank(byte_counts: Sequence[int]) -> str:
    """In MiB: "2 x 44", or "44 + 48" where ranks differ."""
    counts = [f"{count / 2**20:.0f}" for count in byte_counts]
    return f"{len(counts)} x {counts[0]}" if len(set(counts)) == 1 else " + ".join(counts)


def loader_schema(
    node_id: str, display_name: str, description: str, aliases: list[str], mesh_tooltip: str, demo: DemoFile
) -> io.Schema:
    """What all loaders look like: a file and a mesh in, a MODEL out."""
    return io.Schema(
        node_id=node_id,
        display_name=display_name,
        category="parallel",
        description=description,
        **search_aliases(*aliases, "multi gpu", "load diffusion model"),
        inputs=[
            io.Combo.Input(
                "model_name",
                options=names_in(FOLDER, demo),
                tooltip="A file of the diffusion_models (GGUF too) or checkpoints folder, or a pipeline in the diffusers folder.",
            ),
            MeshSocket.Input("mesh", tooltip=mesh_tooltip),
        ],
        outputs=[io.Model.Output(display_name="model", tooltip="A MODEL whose weights live in the backend.")],
    )


class LoadParallelMMDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return loader_schema(
            "LoadParallelMMDiT",
            "Load Parallel MMDiT (SD3 / SD3.5)",
            "Loads SD3-medium, SD3.5-medium or SD3.5-large into the backend, each rank its own part. "
            "The MODEL works with KSampler, guiders and LoRA loaders as any other.",
            ["sd3", "sd3.5"],
            "From Mesh Config.",
            MMDIT_FILE,
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return validity(model_name, FOLDER)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, mesh: None = None) -> str:
        return fingerprint(model_name, FOLDER)

    @classmethod
    def execute(cls, model_name: str, mesh: ParallelMesh) -> io.NodeOutput:
        return load("mmdit", model_name, mesh)


class LoadParallelUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return loader_schema(
            "LoadParallelUNet",
            "Load Parallel UNet (SDXL)",
            "Loads an SDXL UNet (base, refiner, turbo, lightning, SSD-1B, KOALA, inpainting, CosXL) into the backend, where each "
            "rank computes a band of the image. The MODEL works with KSampler, guiders and LoRA loaders as any other.",
            ["sdxl", "distrifusion"],
            "From Mesh Config; its patch ranks take a band each.",
            UNET_FILE,
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return validity(model_name, FOLDER)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, mesh: None = None) -> str:
        return fingerprint(model_name, FOLDER)

    @classmethod
    def execute(cls, model_name: str, mesh: ParallelMesh) -> io.NodeOutput:
        return load("unet", model_name, mesh)


def load(kind: ModelKind, model_name: str, mesh: ParallelMesh) -> io.NodeOutput:
    """A loader's output: the MODEL, and how it came to be there."""
    path = path_of(model_name, FOLDER)
    patcher, report = parallel_model(mesh, kind, path, listed_elsewhere(model_name, FOLDER))
    say("\n".join(filter(None, [taken_for(model_name, FOLDER), report, demo_size(path)])), log=True)
    return io.NodeOutput(patcher)
