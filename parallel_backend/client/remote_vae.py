"""A VAE in a backend."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from torch import Tensor

from ..config import CELL
from ..rpc.messages import Decode, Encode, LoadVAE
from .dtypes import vae_dtype
from .held import Held
from .not_finite import NotFinite, held_by, is_finite
from .sent_tensors import Attachment

log = logging.getLogger("parallel_backend")


class RemoteVAE(Held[LoadVAE]):
    """A VAE in a backend."""

    @property
    def latent_channels(self) -> int:
        return self.loaded.channels

    def decode(self, latent: Tensor, *, raw: bool = False, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, Y, X, 3) in 0..1, fp32; with `raw` the model's own (B, 3, Y, X), about -1..1.

        A float16 that gives NaN or infinity of a latent without is left for good, for what suits the ranks' cards: `note`
        then tells so.

        Args:
            latent: (B, C, Y, X), unscaled.
        Raises: InputError, CancelledError, BackendLostError, RankError; OutOfMemoryError: the ranks are ready for the next
            request, of a part of the latent perhaps; NotFiniteError, with `nan_is_error`.
        """
        return self._computed(lambda name: Decode(name, 0, raw), "latent", latent, should_cancel)

    def encode(self, image: Tensor, *, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, C, Y / 8, X / 8), unscaled, fp32, of an image (B, Y, X, 3) in 0..1; the rest as for `decode`.

        What sides have beyond a multiple of 8 is cut off, as much at either end.
        """
        return self._computed(lambda name: Encode(name, 0), "image", cropped(image), should_cancel)

    def _computed(
        self,
        body: Callable[[str], Decode | Encode],
        what: str,
        x: Tensor,
        should_cancel: Callable[[], bool] | None,
    ) -> Tensor:
        self.note, x = "", x.float()
        given = held_by({what: x})
        if given and self.nan_is_error:
            self._tell(NotFinite(given, in_result=False))
        out = self._request(body(self.name), [Attachment(x)], should_cancel=should_cancel)[0]
        left = "" if given or self.load.dtype != "float16" or is_finite(out) else self._leave_float16(should_cancel)
        if left:
            out = self._request(body(self.name), [Attachment(x)], should_cancel=should_cancel)[0]
        if given or not is_finite(out):
            self._tell(NotFinite(given, in_result=not is_finite(out)))
        elif left:
            self.note = left
            log.warning("%s", left)
        return out

    def _leave_float16(self, should_cancel: Callable[[], bool] | None) -> str:
        """It is loaded in what suits the ranks' cards. Returns: what is to be told of that."""
        dtype = vae_dtype(self.backend.status(should_cancel).ranks)
        self.leave(should_cancel)
        self.load = msgspec.structs.replace(self.load, dtype=dtype)
        self.ensure_loaded(should_cancel)
        return f"{self.file} overflows in float16: it gave NaN, and is computed in {dtype} from now on."


def cropped(image_BYXC: Tensor) -> Tensor:
    """The middle of the image whose sides are multiples of a cell's; a side of less than a cell stays as it is."""
    for dim in (1, 2) if image_BYXC.ndim == 4 else ():
        side = image_BYXC.shape[dim]
        if side >= CELL:
            image_BYXC = image_BYXC.narrow(dim, side % CELL // 2, side - side % CELL)
    return image_BYXC
