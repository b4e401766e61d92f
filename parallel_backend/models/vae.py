"""SD3's and SDXL's VAE and TAESD, decoding and encoding in horizontal bands, one per rank.

The models are diffusers' AutoencoderKL and AutoencoderTiny with banded layers put in place.
Shapes: B batch, C latent channels, Y X rows and columns: of latent cells or of pixels, as named.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..config import CELL
from ..distributed.band import Band
from ..distributed.collectives import first_says, gather_to_first, slots_on_first, split_sizes
from ..distributed.device_faults import OutOfStep
from ..distributed.device_memory import as_out_of_memory
from ..distributed.mesh import BandAxes
from ..distributed.traffic import Debt
from ..errors import CancelledError, InputError

# What a decoder or an encoder runs one after the other, in either kind of VAE.
_BLOCK = re.compile(r"(en|de)coder\.(mid_block|(up|down)_blocks\.\d+|layers\.\d+)")
# TAESD was trained on the model's scaled latents: (latent - shift) * scale. Source: each model's VAE configuration.
TAESD_SCALES = {"taesd": (0.18215, 0.0), "taesdxl": (0.13025, 0.0), "taesd3": (1.5305, 0.0609)}
# Of three tensors of the image's size with 256 channels: what the last blocks of SD3's and SDXL's decoder hold at once.
_ELEMENTS_A_PIXEL = 3 * 256
_CHANNEL_REMEDIES = {
    1: "It is grey: repeat its channel three times; in ComfyUI, Convert Image to Mask (red), then Convert Mask to Image.",
    4: "Leave its alpha channel out.",
}


Agreed: TypeAlias = Callable[[Callable[[], "_Bands | None"]], "_Bands | None"]


def _alone(local: Callable[[], _Bands | None]) -> _Bands | None:
    """For one rank, or ranks whose errors end them all."""
    return local()


@dataclass(frozen=True)
class _Bands:
    """A rank's bands (B, C, Y, X), and on rank 0 the room for the others'."""

    own: Tensor
    slots: list[Tensor]


@dataclass
class BandVAE:
    """A VAE that computes an image in bands. Every rank has the whole input; rank 0 gets the whole output."""

    model: Any  # AutoencoderKL or AutoencoderTiny, whose layers diffusers doesn't type
    family: str
    latent_channels: int
    device: torch.device
    dtype: torch.dtype
    band: Band
    axes: BandAxes
    _cancelled: Callable[[], bool] = field(init=False, default_factory=lambda: lambda: False)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules():
            if _BLOCK.fullmatch(name):
                module.register_forward_pre_hook(self._check_cancelled)

    def _check_cancelled(self, *_: object) -> None:
        if first_says(self._cancelled(), self.band.axis):
            raise CancelledError("The job was cancelled by its client.")

    def check_latent(self, latent: Tensor) -> None:
        """Raises: InputError: not (B, C, Y, X) of this VAE's channels."""
        came = f"A latent of shape {list(latent.shape)} came; this VAE ({self.family}) needs "
        needed = f"(batch, {self.latent_channels}, height / 8, width / 8)."
        if latent.ndim != 4 or 0 in latent.shape:
            raise InputError(came + needed, "Give a batch of one latent or more, of one cell or more.")
        if latent.shape[1] != self.latent_channels:
            raise InputError(came + needed, "Use the VAE that belongs to the model of this latent.")

    def check_image(self, image: Tensor) -> None:
        """Raises: InputError: not (B, Y, X, 3) with sides divisible by 8."""
        if image.ndim != 4 or image.shape[0] == 0:
            raise InputError(
                f"An image of shape {list(image.shape)} came; (batch, height, width, 3) is needed.",
                "Give a batch of one image or more.",
            )
        _, height, width, channels = image.shape
        came = f"An image of {width} x {height} pixels came (width x height);"
        if min(height, width) < CELL:
            raise InputError(
                f"{came} a cell of the latent takes {CELL} x {CELL}.", f"Scale both sides to {CELL} pixels or more."
            )
        if channels != 3:
            raise InputError(
                f"An image of {channels} channel{'s' * (channels != 1)} came; red, green and blue are needed.",
                _CHANNEL_REMEDIES.get(channels, "Convert it to RGB."),
            )
        if height % CELL or width % CELL:
            raise InputError(
                f"{came} {CELL} x {CELL} make a cell of the latent.",
                f"Crop or scale both sides to a multiple of {CELL}.",
            )

    def most_bytes(self, latent_rows: int, latent_columns: int) -> int:
        """What a picture of so many cells takes of this rank beside the weights, at most: TAESD and encoders need less."""
        rows = -(-latent_rows // min(self.axes.world_size, latent_rows))
        return rows * latent_columns * CELL**2 * _ELEMENTS_A_PIXEL * self.dtype.itemsize

    def decode(
        self,
        latent_BCYX: Tensor,
        raw: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
        agreed: Agreed = _alone,
    ) -> Tensor | None:
        """The image of a latent (unscaled, as ComfyUI has it), fp32, on rank 0's CPU; None on the others.

        Args:
            raw: give the model's own output, (B, 3, Y, X), about -1..1, in place of (B, Y, X, 3) clamped to 0..1.
            cancelled: asked on rank 0 before each block.
            agreed: makes an error of any rank all ranks': see Control.agreed. Every rank calls it alike.
        Raises: CancelledError; OutOfMemoryError: a rank lacks memory, and all are ready for the next job.
        Comm: that of the layers, one gather of the bands, and a byte from rank 0 before each block.
        """
        self._cancelled = cancelled
        start, stop = self._cut(*latent_BCYX.shape[2:])
        compute = self._decoded if raw else self._pictured
        bands = agreed(lambda: self._bands(compute, latent_BCYX[:, :, start:stop], CELL))
        image = self._gathered(bands, CELL)
        return image if image is None or raw else image.permute(0, 2, 3, 1).contiguous()

    def encode(
        self, image_BYXC: Tensor, cancelled: Callable[[], bool] = lambda: False, agreed: Agreed = _alone
    ) -> Tensor | None:
        """The latent of an image in 0..1, unscaled, fp32, on rank 0's CPU; None on the others. The distribution's mode.

        Args, Raises, Comm: as `decode`.
        """
        self._cancelled = cancelled
        start, stop = self._cut(*(side // CELL for side in image_BYXC.shape[1:3]))
        pixels = image_BYXC[:, start * CELL : stop * CELL].permute(0, 3, 1, 2)
        bands = agreed(lambda: self._bands(self._encoded, pixels, 1))
        return self._gathered(bands, 1)

    def _decoded(self, latent: Tensor) -> Tensor:
        """The model's own output (1, 3, Y, X) of a band of one latent, fp32."""
        if self.family in TAESD_SCALES:
            scale, shift = TAESD_SCALES[self.family]
            return self.model.decoder(((latent - shift) * scale).to(self.dtype)).float()
        band = latent.to(self.dtype)
        if self.model.post_quant_conv is not None:
            band = self.model.post_quant_conv(band)
        return self.model.decoder(band).float()

    def _pictured(self, latent: Tensor) -> Tensor:
        """As `_decoded`, in 0..1."""
        return ((self._decoded(latent) + 1) / 2).clamp_(0, 1)

    def _encoded(self, pixels: Tensor) -> Tensor:
        """The latent (1, C, Y, X) of a band (1, 3, Y * 8, X * 8) of one image in 0..1, fp32."""
        moments = self.model.encoder((pixels * 2 - 1).to(self.dtype))
        if self.family in TAESD_SCALES:
            scale, shift = TAESD_SCALES[self.family]
            return moments.float() / scale + shift
        if self.model.quant_conv is not None:
            moments = self.model.quant_conv(moments)
        return moments.float().chunk(2, dim=1)[0]

    def _bands(self, compute: Callable[[Tensor], Tensor], band: Tensor, factor: int) -> _Bands | None:
        """This rank's band of every image, and room for the others' on rank 0; None on ranks beyond the last row.

        Raises: OutOfMemoryError: once this rank has done its part of all that the others need of it.
        """
        if band.shape[2] == 0:
            return None
        axis, before = self.band.axis, self.band.axis.traffic.collectives
        try:
            images = [compute(one.to(self.device, torch.float32)) for one in band.split(1)]
            own = torch.cat(images) if len(images) > 1 else images[0]
            return _Bands(own, slots_on_first(own, 2, [rows * factor for rows in self.band.rows], axis))
        except Exception as error:
            lacks = as_out_of_memory(error, self.device, axis.global_rank(axis.rank))
            if lacks is None:
                raise
        # Only here, where nothing refers to the error any more, is the memory free that its frames held.
        if axis.degree > 1:
            self._pay(compute, band, axis.traffic.collectives - before)
        raise lacks

    def _pay(self, compute: Callable[[Tensor], Tensor], band: Tensor, given: int) -> None:
        """The others' exchanges go on without this rank's values: see `Debt`.

        The first time, torch imports a part of itself that computes without values: a second, and some MB on the CPU.

        Raises: CancelledError, on all ranks alike; OutOfStep.
        """
        traffic, held = self.band.axis.traffic, self.model.state_dict()
        traffic.debt = Debt(self.device, given)
        self.model.load_state_dict({name: weight.to("meta") for name, weight in held.items()}, assign=True)
        try:
            for one in band.to("meta").split(1):
                compute(one.float())
        except CancelledError:
            raise
        except Exception as error:
            raise OutOfStep("This rank can't end what the others wait for.") from error
        finally:
            self.model.load_state_dict(held, assign=True)
            traffic.debt = None

    def _cut(self, latent_rows: int, latent_columns: int) -> tuple[int, int]:
        """This rank's rows of latent cells; none on ranks beyond the last row."""
        degree = min(self.axes.world_size, latent_rows)
        axis = self.axes.first(degree)
        if axis is None:
            return 0, 0
        self.band.axis, self.band.rows, self.band.columns = axis, split_sizes(latent_rows, degree), latent_columns
        return self.band.own_rows

    def _gathered(self, bands: _Bands | None, factor: int) -> Tensor | None:
        """All bands joined on rank 0's CPU, where the whole image takes no GPU's memory a second time."""
        if bands is None:
            return None
        sizes = [rows * factor for rows in self.band.rows]
        parts = gather_to_first(bands.own, 2, sizes, self.band.axis, bands.slots)
        return None if parts is None else torch.cat([part.cpu() for part in parts], dim=2)
