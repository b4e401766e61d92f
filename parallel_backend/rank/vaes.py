"""VAEs that ranks hold, in bands of the picture; what they decode and encode."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..config import CELL, DTYPES, MeshSpec, choose
from ..distributed.device_memory import give_back
from ..distributed.mesh import BandAxes
from ..fused.all import FUSED
from ..fused.operation import note_of
from ..models.vae import BandVAE
from ..models.vae_checkpoint import open_vae
from ..rpc.messages import Decode, Encode, LoadVAE, Result
from ..rpc.state import ModelState
from .allowed_files import AllowedFiles
from .jobs import Job
from .meter import Meter
from .residents import Resident, Residents


class VAEs:
    """Those among a rank's residents."""

    def __init__(self, device: torch.device, residents: Residents, files: AllowedFiles, bands: BandAxes) -> None:
        self._device, self._residents, self._files, self._bands = device, residents, files, bands

    def load(self, body: LoadVAE, name: str, job: Job) -> tuple[list[str], int, list[str]]:
        """It is held as `name`. Returns: the models that left for it, bytes read, and what the user should know.

        Raises: CheckpointError, UnsupportedError, ConfigError, OutOfMemoryError: on every rank alike.
        """
        choose(body.dtype, DTYPES, "dtype")
        paths = job.control.agreed(lambda: self._files.all_checked(body.paths, body.key))
        checkpoint = job.control.agreed(lambda: open_vae(paths))
        dtype = getattr(torch, body.dtype)
        needed = checkpoint.elements * dtype.itemsize
        evicted = self._residents.make_room(needed, paths[0].name, "vae", MeshSpec(), job.control)

        def build() -> tuple[BandVAE, str]:
            vae = checkpoint.build(self._device, dtype, self._bands, job.given_up, meter.add)
            return vae, note_of(FUSED, self._device)

        meter = Meter(job, f"loading {paths[0].name}", "bytes", needed)
        vae, note = job.control.agreed(build)
        meter.finish()
        state = ModelState(name, paths[0].name, vae.family, "bands", body.dtype, needed)
        self._residents[name] = Resident(vae, state, vae.latent_channels)
        return evicted, checkpoint.bytes_read, [checkpoint.note, note]

    def decode(self, body: Decode, tensors: list[Tensor], job: Job) -> tuple[Result, list[Tensor]]:
        """The image, or nothing where the job was cancelled. Raises: InputError, UnknownModelError: on every rank alike."""
        start = time.perf_counter()
        vae: BandVAE = job.control.agreed(lambda: self._checked(body.vae, tensors[body.latent], "latent"))
        self._room_for_picture(vae, *tensors[body.latent].shape[2:])
        image = vae.decode(tensors[body.latent], raw=body.raw, cancelled=job.cancelled, agreed=job.control.agreed)
        give_back(self._device)  # the most that any job takes: others may need it, a text encoder of ComfyUI's perhaps
        return Result(time.perf_counter() - start), [image] if image is not None else []

    def encode(self, body: Encode, tensors: list[Tensor], job: Job) -> tuple[Result, list[Tensor]]:
        """As `decode`, the latent."""
        start = time.perf_counter()
        vae: BandVAE = job.control.agreed(lambda: self._checked(body.vae, tensors[body.image], "image"))
        self._room_for_picture(vae, *(side // CELL for side in tensors[body.image].shape[1:3]))
        latent = vae.encode(tensors[body.image], cancelled=job.cancelled, agreed=job.control.agreed)
        give_back(self._device)
        return Result(time.perf_counter() - start), [latent] if latent is not None else []

    def _room_for_picture(self, vae: BandVAE, latent_rows: int, latent_columns: int) -> None:
        """Graphs leave where a VAE would lack their memory. Each rank for itself: one without a graph computes beside those with one."""
        if vae.most_bytes(latent_rows, latent_columns) > self._residents.free_bytes():
            self._residents.let_go_of_graphs()

    def _checked(self, name: str, x: Tensor, what: str) -> BandVAE:
        vae: BandVAE = self._residents.model(name, BandVAE)
        vae.check_latent(x) if what == "latent" else vae.check_image(x)
        return vae
