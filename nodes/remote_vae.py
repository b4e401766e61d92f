"""A ComfyUI VAE whose decode and encode are requests to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import comfy.model_management as mm
import comfy.sd
import torch
from torch import Tensor

from ..parallel_backend import RemoteVAE
from ..parallel_backend.errors import OutOfMemoryError, UnsupportedError
from .core_memory import WeightsElsewhere, interruptible
from .node_text import own_text, say

# Of the tiles in which ComfyUI's own VAE goes on where memory is short.
TILES = "in tiles of 512 x 512, 256 x 1024 and 1024 x 256 pixels that overlap"


class RemoteFirstStage(torch.nn.Module):
    """The network as tiled decoding calls it: latents to pixels in -1..1 and back, channels first."""

    def __init__(self, remote: RemoteVAE) -> None:
        super().__init__()
        self.remote = remote
        self.notes: dict[str, None] = {}  # on tiles since somebody looked, each once

    def decode(self, latent_BCYX: Tensor) -> Tensor:
        return self._noted(self.remote.decode, latent_BCYX, raw=True)

    def encode(self, pixels_BCYX: Tensor) -> Tensor:
        return self._noted(self.remote.encode, ((pixels_BCYX + 1) / 2).movedim(1, -1))

    def _noted(self, request: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        out = interruptible(self.remote.backend, request, *args, **kwargs)
        if self.remote.note:
            self.notes[self.remote.note] = None
        return out


class VAEWeights(WeightsElsewhere):
    @property
    def remote(self) -> RemoteVAE:
        return self.model.remote


class ParallelVAE(comfy.sd.VAE):
    """What VAEDecode, VAEDecodeTiled, VAEEncode and their kin use of a VAE. Holds no weights."""

    def __init__(self, remote: RemoteVAE, held_here: int) -> None:
        """`held_here`: bytes, as of `bytes_here`."""
        # The base class would build and load a network here; this one lives in the backend.
        self.first_stage_model = RemoteFirstStage(remote)
        self.remote = remote
        self.latent_channels, self.latent_dim, self.output_channels = remote.latent_channels, 2, 3
        self.downscale_ratio = self.upscale_ratio = 8
        self.downscale_index_formula = self.upscale_index_formula = self.extra_1d_channel = None
        self.pad_channel_value = self.format_encoded = self.size = None
        self.crop_input, self.not_video, self.handles_tiling, self.disable_offload = True, False, False, False
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: ((image + 1.0) / 2.0).clamp_(0.0, 1.0)
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 0
        self.working_dtypes, self.vae_dtype = [torch.float32], torch.float32
        self.device = self.output_device = mm.intermediate_device()
        devices = {"load_device": mm.get_torch_device(), "offload_device": mm.vae_offload_device()}
        self.patcher = VAEWeights(self.first_stage_model, size=held_here, **devices)
        self.patcher.note_held()
        self.patcher.register()

    def throw_exception_if_invalid(self) -> None:
        """It was loaded, so it is valid."""

    def is_dynamic(self) -> bool:
        return False

    def vae_encode_crop_pixels(self, pixels: Tensor) -> Tensor:
        """As stock's, but a side that is no cell long is left, not cut to nothing: the ranks refuse it by its size."""
        return pixels if min(pixels.shape[1:3]) < self.downscale_ratio else super().vae_encode_crop_pixels(pixels)

    @own_text()
    def decode(self, samples_in: Tensor, vae_options: dict[str, Any] | None = None) -> Tensor:
        if vae_options:
            raise UnsupportedError(f"A parallel VAE has no options {list(vae_options)}.", "Decode without them.")
        samples = samples_in[:, :, 0] if samples_in.ndim == 5 else samples_in
        self.patcher.register()
        image = self._whole("Decoding", self.remote.decode, samples)
        return self._tiled(self.decode_tiled_, samples).movedim(1, -1) if image is None else image

    @own_text()
    def encode(self, pixel_samples: Tensor) -> Tensor:
        self.patcher.register()
        pixels = self.vae_encode_crop_pixels(pixel_samples)
        latent = self._whole("Encoding", self.remote.encode, pixels)
        return self._tiled(self.encode_tiled_, pixels.movedim(-1, 1)) if latent is None else latent

    def _whole(self, doing: str, request: Callable[..., Tensor], x: Tensor) -> Tensor | None:
        """What it gives of the whole image; None where a rank has no memory for its band, which the node says."""
        try:
            out = interruptible(self.remote.backend, request, x).to(self.output_device)
        except OutOfMemoryError as error:
            say(f"{error.message} {doing} goes on {TILES}, as on ComfyUI's own VAE.", log=True)
            return None
        if self.remote.note:
            say(self.remote.note, log=True)
        return out

    def _tiled(self, run: Callable[..., Tensor], x: Tensor, **tiles: Any) -> Tensor:
        """ComfyUI's own way through the tiles, each a request; what the user should know of them is on the node."""
        notes = self.first_stage_model.notes
        notes.clear()
        out = run(x, **tiles)
        for note in notes:
            say(note, log=True)
        return out

    @own_text()
    def decode_tiled(  # type: ignore[override]
        self,
        samples: Tensor,
        tile_x: Any = None,
        tile_y: Any = None,
        overlap: Any = None,
        tile_t: Any = None,
        overlap_t: Any = None,
    ) -> Tensor:
        tiles = {"tile_x": tile_x, "tile_y": tile_y, "overlap": overlap}
        self.patcher.register()
        given = {k: v for k, v in tiles.items() if v is not None}
        return self._tiled(self.decode_tiled_, samples, **given).movedim(1, -1)

    @own_text()
    def encode_tiled(  # type: ignore[override]
        self,
        pixel_samples: Tensor,
        tile_x: Any = None,
        tile_y: Any = None,
        overlap: Any = None,
        tile_t: Any = None,
        overlap_t: Any = None,
    ) -> Tensor:
        tiles = {"tile_x": tile_x, "tile_y": tile_y, "overlap": overlap}
        self.patcher.register()
        pixels = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)
        return self._tiled(self.encode_tiled_, pixels, **{k: v for k, v in tiles.items() if v is not None})

    def get_sd(self) -> NoReturn:
        raise UnsupportedError(
            "A parallel VAE can't be saved: its weights live in the backend.", "Save the file's own VAE."
        )
