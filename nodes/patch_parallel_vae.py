"""PatchParallelVAE: decode and encode in bands over all ranks."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..parallel_backend.errors import CheckpointError
from .load_models import file_fingerprint
from .node_text import say
from .parallel_mesh import MeshSocket, ParallelMesh, make_room
from .remote_model import interruptible
from .remote_vae import ParallelVAE

TAESD_NAMES = ("taesd3", "taesdxl")


def vae_names() -> list[str]:
    """Files of the vae folder, and the TAESD families whose encoder and decoder are in vae_approx."""
    return [*folder_paths.get_filename_list("vae"), *(name for name in TAESD_NAMES if None not in _taesd_files(name))]


def vae_paths(name: str) -> list[Path]:
    """One file, or TAESD's encoder and decoder.

    Raises: CheckpointError: not in the model folders.
    """
    found = _taesd_files(name) if name in TAESD_NAMES else [folder_paths.get_full_path("vae", name)]
    paths = [Path(path) for path in found if path is not None]
    if len(paths) < len(found):
        raise CheckpointError(f"There is no VAE {name!r} in ComfyUI's model folders.", "Put it in vae or vae_approx.")
    return paths


def _taesd_files(name: str) -> list[str | None]:
    return [folder_paths.get_full_path("vae_approx", f"{name}_{part}.safetensors") for part in ("encoder", "decoder")]


class PatchParallelVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PatchParallelVAE",
            display_name="Patch Parallel VAE",
            category="parallel",
            description="A VAE that decodes and encodes in horizontal bands, one per rank: no seams, "
            "and activation memory per GPU falls with the number of ranks.",
            search_aliases=["vae", "taesd", "multi gpu", "load vae"],
            inputs=[
                io.Combo.Input("vae_name", options=vae_names(), tooltip="SD3's or SDXL's VAE, or taesd3 / taesdxl."),
                MeshSocket.Input("mesh", tooltip="From Mesh Config; all its ranks take a band."),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode, VAE Encode and their kin.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, mesh: None = None) -> str:
        return " ".join(file_fingerprint(path) for path in vae_paths(vae_name))

    @classmethod
    def execute(cls, vae_name: str, mesh: ParallelMesh) -> io.NodeOutput:
        paths = vae_paths(vae_name)
        backend = mesh.backend()
        room = make_room(backend, sum(path.stat().st_size for path in paths))
        remote = interruptible(backend.load_vae, paths, mesh.dtype)
        state = "already resident" if not any(remote.loaded.bytes_read) else f"read in {remote.loaded.seconds:.1f} s"
        report = "\n".join(filter(None, [f"{remote.loaded.family}: {state}, {backend.world_size} bands", room]))
        say(report)
        return io.NodeOutput(ParallelVAE(remote), ui=ui.PreviewText(report))
