"""PatchParallelVAE: decode and encode in bands over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comfy_api.latest import io

from .core_dtype import vae_dtype
from .core_memory import bytes_here, interruptible, make_room
from .known_to_core import search_aliases
from .model_files import vae_fingerprint, vae_listed_elsewhere, vae_names, vae_paths, vae_taken_for, vae_validity
from .node_text import say
from .parallel_mesh import MeshSocket, ParallelMesh
from .remote_vae import ParallelVAE

# The largest of the VAEs that this node takes, in fp32.
VAE_BYTES = 384 * 2**20


class PatchParallelVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PatchParallelVAE",
            display_name="Patch Parallel VAE",
            category="parallel",
            description="A VAE that decodes and encodes in horizontal bands, one per rank: no seams, "
            "and activation memory per GPU falls with the number of ranks.",
            **search_aliases("vae", "taesd", "multi gpu", "load vae"),
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=vae_names(),
                    tooltip="SD3's or SDXL's VAE, alone or in a full checkpoint, or taesd3 / taesdxl.",
                ),
                MeshSocket.Input("mesh", tooltip="From Mesh Config; all its ranks take a band."),
            ],
            outputs=[io.Vae.Output(display_name="vae", tooltip="For VAE Decode, VAE Encode and their kin.")],
        )

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None) -> bool | str:
        return vae_validity(vae_name)

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, mesh: None = None) -> str:
        return vae_fingerprint(vae_name)

    @classmethod
    def execute(cls, vae_name: str, mesh: ParallelMesh) -> io.NodeOutput:
        vae, report = parallel_vae(mesh, vae_paths(vae_name), vae_listed_elsewhere(vae_name))
        say("\n".join(filter(None, [vae_taken_for(vae_name), report])), log=True)
        return io.NodeOutput(vae)


def parallel_vae(mesh: ParallelMesh, paths: Sequence[Path], names: Sequence[str]) -> tuple[ParallelVAE, str]:
    """The VAE of one file, or of TAESD's two, in the backend, and lines about how it came there.

    Args:
        names: what a backend elsewhere calls them.
    Raises: CheckpointError: no VAE of SD3's or SDXL's.
    """
    backend = mesh.backend()
    dtype = vae_dtype(backend, mesh.dtype)
    room = make_room(backend, VAE_BYTES, f"{backend.key(*paths)}/{dtype}/")
    remote = interruptible(backend, backend.load_vae, paths, dtype, names=names)
    remote.nan_is_error = mesh.nan_is_error
    state = "already resident" if not any(remote.loaded.bytes_read) else f"read in {remote.loaded.seconds:.1f} s"
    lines = [
        f"{remote.loaded.family}: {state}, {backend.world_size} bands, {dtype}",
        *remote.loaded.notes,
        room,
        mesh.differs(),
    ]
    return ParallelVAE(remote, bytes_here(remote)), "\n".join(filter(None, lines))
