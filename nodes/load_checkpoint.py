"""LoadParallelCheckpoint: Load Checkpoint's three outputs, of which the MODEL is parallel."""

from __future__ import annotations

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..parallel_backend.errors import CheckpointError
from .family import NAMES, kind_of_file
from .known_to_core import search_aliases
from .load_models import parallel_model
from .loader_file import leave
from .mesh_config import default_mesh
from .model_files import fingerprint, name_elsewhere, path_of, taken_for, validity
from .node_text import say
from .parallel_mesh import ParallelMesh, optional_mesh
from .patch_parallel_vae import parallel_vae as load_parallel_vae

FOLDER = "checkpoints"


class LoadParallelCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadParallelCheckpoint",
            display_name="Load Parallel Checkpoint",
            category="parallel",
            description="Load Checkpoint with a parallel MODEL. CLIP and VAE are ComfyUI's own; "
            "ComfyUI does not read the diffusion weights.",
            **search_aliases("checkpoint", "ckpt", "load checkpoint", "multi gpu", "sdxl", "sd3"),
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="An SD3, SD3.5 or SDXL checkpoint.",
                ),
                optional_mesh("The ranks, and how they share the work."),
                io.Boolean.Input(
                    "parallel_vae",
                    default=False,
                    optional=True,
                    tooltip="The VAE decodes and encodes in bands too, one per rank. Off: ComfyUI's own VAE.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="A MODEL whose weights live in the backend."),
                io.Clip.Output(display_name="CLIP", tooltip="The checkpoint's text encoders, in ComfyUI."),
                io.Vae.Output(display_name="VAE", tooltip="The checkpoint's VAE."),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name: str | None = None) -> bool | str:
        return validity(ckpt_name, FOLDER)

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, mesh: None = None, parallel_vae: bool = False) -> str:
        return fingerprint(ckpt_name, FOLDER)

    @classmethod
    def execute(cls, ckpt_name: str, mesh: ParallelMesh | None = None, parallel_vae: bool = False) -> io.NodeOutput:
        path, mesh = path_of(ckpt_name, FOLDER), mesh or default_mesh()
        kind = kind_of_file(path)
        if kind is None:
            raise CheckpointError(f"{ckpt_name} holds none of {NAMES}.", "Use ComfyUI's Load Checkpoint for it.")
        model, report = parallel_model(mesh, kind, path, name_elsewhere(path))
        _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(path),
            output_vae=not parallel_vae,
            output_clip=True,
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            output_model=False,
        )
        if parallel_vae:
            vae, vae_report = load_parallel_vae(mesh, [path], [name_elsewhere(path)])
            leave(vae.patcher, comfy.sd.load_checkpoint_guess_config, [str(path)])
            report = f"{report}\n{vae_report}"
        say("\n".join(filter(None, [taken_for(ckpt_name, FOLDER), report])), log=True)
        return io.NodeOutput(model, clip, vae)
