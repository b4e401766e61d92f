"""ParallelizeModel and ParallelizeVAE: what any loader gave, computed by the backend."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..parallel_backend.errors import UnsupportedError
from .core_memory import same_weights
from .family import NAMES, kind_of_model
from .hung.displaced_steps import as_mesh_asks
from .hung.layers import network_changes
from .hung.refusal import refuse
from .known_to_core import search_aliases
from .load_models import parallel_model
from .loader_file import leave, model_file, vae_file
from .mesh_config import default_mesh
from .model_files import name_elsewhere
from .node_text import say
from .parallel_mesh import ParallelMesh, optional_mesh
from .patch_parallel_vae import parallel_vae
from .remote_model import RemotePatcher
from .remote_vae import ParallelVAE

# Of a patcher's fields those that tell of its own network and where that lies; all others are what hangs on the MODEL.
_OF_THE_NETWORK = frozenset(
    {"model", "size", "load_device", "offload_device", "parent", "pinned", "weight_inplace_update", "clone_base_uuid"}
    | {"backup", "backup_buffers", "object_patches_backup", "is_injected"}
    | {"hook_backup", "hook_patches_backup", "cached_hook_patches", "current_hooks", "_sets"}
)
_CHANGED_LAYERS = (
    "These act on the network that ComfyUI holds. Remove the node that makes them, or leave this node out of the wire."
)


class ParallelizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParallelizeModel",
            display_name="Parallelize Model",
            category="parallel",
            description="Makes the MODEL of any loader parallel: the ranks read its file, and what hangs on it already "
            "(model sampling, patches, options) is taken along. ComfyUI does not load the diffusion weights.",
            **search_aliases("multi gpu", "parallel", "distrifusion", "tensor parallel"),
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD3, SD3.5 or SDXL, from Load Checkpoint, Load Diffusion Model or a node behind it.",
                ),
                optional_mesh("The ranks, and how they share the work."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="A MODEL whose weights live in the backend.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, mesh: ParallelMesh | None = None) -> io.NodeOutput:
        if mesh is None and isinstance(model, RemotePatcher):
            return io.NodeOutput(model)
        parallel, report = parallelized(model, mesh or default_mesh())
        say(report, log=True)
        return io.NodeOutput(parallel)


class ParallelizeVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParallelizeVAE",
            display_name="Parallelize VAE",
            category="parallel",
            description="Makes the VAE of Load Checkpoint or Load VAE parallel: it decodes and encodes in horizontal "
            "bands, one per rank, without seams.",
            **search_aliases("vae", "multi gpu", "parallel"),
            inputs=[
                io.Vae.Input("vae", tooltip="SD3's or SDXL's, from Load Checkpoint or Load VAE."),
                optional_mesh("Its ranks take a band each."),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode, VAE Encode and their kin.")],
        )

    @classmethod
    def execute(cls, vae: comfy.sd.VAE, mesh: ParallelMesh | None = None) -> io.NodeOutput:
        if mesh is None and isinstance(vae, ParallelVAE):
            return io.NodeOutput(vae)
        file = vae_file(vae.patcher)
        refuse(_unseen_of_vae(vae), "A parallel VAE", _CHANGED_LAYERS)
        parallel, report = parallel_vae(mesh or default_mesh(), [file.path], [name_elsewhere(file.path)])
        leave(parallel.patcher, file.load, file.args)
        say(report, log=True)
        return io.NodeOutput(parallel)


def parallelized(model: ModelPatcher, mesh: ParallelMesh) -> tuple[ModelPatcher, str]:
    """The MODEL on that mesh, with all that hangs on it, and lines about how it came there. One that is there already is given back.

    Raises: UnsupportedError: another family, no file that could be read, or layers that were changed; CheckpointError.
    """
    kind = kind_of_model(model.model)
    if kind is None:
        raise UnsupportedError(
            f"A MODEL of {type(model.model).__name__} can't be parallel; {NAMES} can.",
            "Leave Parallelize Model out of this MODEL's wire.",
        )
    file = model_file(model)
    refuse(_unseen_by_ranks(model), "A parallel MODEL", _CHANGED_LAYERS)
    parallel, report = parallel_model(mesh, kind, file.path, name_elsewhere(file.path), file.options)
    if isinstance(model, RemotePatcher) and same_weights(model.remote, parallel.remote):
        return as_mesh_asks(model, mesh.displaced), report
    take_along(model, parallel)
    return as_mesh_asks(parallel, mesh.displaced), report


def take_along(source: ModelPatcher, parallel: RemotePatcher) -> None:
    """What hangs on `source` hangs on `parallel` too, as on a clone: patches, options, wrappers, hooks, and where it came from."""
    hung = vars(source.clone())
    for name in vars(parallel).keys() & hung.keys() - _OF_THE_NETWORK:
        setattr(parallel, name, hung[name])
    parallel.sample_in_backend()  # its own wrapper, beside those


def _unseen_by_ranks(model: ModelPatcher) -> Iterator[str]:
    if model.additional_models.get("multigpu"):
        yield "ComfyUI's own MultiGPU"
    if isinstance(model, RemotePatcher):
        yield from network_changes(model.model)
    else:
        yield from changed_layers(model.model.diffusion_model)


def _unseen_of_vae(vae: comfy.sd.VAE) -> Iterator[str]:
    if vae.patcher.patches:
        yield f"a patch on {len(vae.patcher.patches)} weights"
    yield from changed_layers(vae.first_stage_model)


def changed_layers(network: torch.nn.Module) -> Iterator[str]:
    """What nodes have changed on the layers themselves, where no patcher tells of it: the first of each kind."""
    found: dict[str, str] = {}
    for name, layer in network.named_modules():
        for what in _changes(layer):
            found.setdefault(what, name or type(network).__name__)
    yield from (f"{what} (of {name})" for what, name in found.items())


def _changes(layer: torch.nn.Module) -> Iterator[str]:
    yield from (f"a replaced {name}" for name in ("forward", "_conv_forward") if name in vars(layer))
    if layer._forward_hooks or layer._forward_pre_hooks:
        yield "a hook on a layer"
    if isinstance(layer, torch.nn.Conv2d) and layer.padding_mode != "zeros":
        yield f"the padding {layer.padding_mode!r}"
