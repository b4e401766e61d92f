"""Attention layers whose outputs are kept from one evaluation of a sampling for later ones.

Source: T-GATE (Zhang et al. 2024, arXiv 2404.02747), section 4.
Shapes: B rows, L tokens of this rank's band, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError, UnsupportedError
from ..models.extra import Extra
from ..models.spread import UNKNOWN, Spread
from ..rpc.extras import KeptAttention, KeptForm
from .kept_outputs import KeptOutputs
from .target import Target

_TAKEN = ("taken", "taken_mean")


@dataclass(frozen=True, kw_only=True)
class GatedAttention(Extra):
    """Of every self-attention of a UNet and every attention to the prompt, projection out included.

    Args:
        outputs: of its sampling. spread: where an evaluation's rows are.
    Comm: where a mean over prompts is first taken whose rows are on several ranks, each layer's output to all of these.
    """

    places: tuple[Place, ...]
    self_attention: KeptForm
    cross_attention: KeptForm
    outputs: KeptOutputs
    spread: Spread = UNKNOWN
    pairs = True
    has_memory = True
    omits_attention = True
    name = "T-Gate"

    @classmethod
    def read(cls, asked: KeptAttention, target: Target, range_of: dict[str, Any]) -> GatedAttention:
        """Raises: InputError: what is to be taken was not kept, or is kept no more, or is of latents of another size."""
        assert target.unet is not None
        places, outputs = tuple(target.unet.places), target.samplings.of(asked.sampling)
        size = (target.height, target.width)
        forms = {"self": asked.self_attention, "cross": asked.cross_attention}
        taken = [(layer, place) for layer, form in forms.items() if form in _TAKEN for place in places]
        alone = [layer for layer in taken if forms[layer[0]] == "taken"]
        if any(layer not in outputs for layer in taken) or not all(map(outputs.has_rows, alone)):
            raise InputError(
                f"T-Gate asks for outputs of attention layers that are not kept of the sampling {asked.sampling!r}.",
                "Sample again; where several clients sample with T-Gate at the same time, one after the other.",
            )
        if taken and outputs.size != size:
            raise InputError(
                f"T-Gate kept outputs of latents of {outputs.size} (height, width), and takes them for latents of {size}.",
                "Sample the whole picture at once: no areas of other sizes, and no tiles.",
            )
        outputs.size = size
        gates: dict[str, Any] = {"self_attention": asked.self_attention, "cross_attention": asked.cross_attention}
        return cls(places=places, outputs=outputs, **gates, **range_of)

    def check_beside(self, others: Sequence[Extra]) -> None:
        if resizing := [other.name for other in others if other.resizes]:
            raise UnsupportedError(
                f"{self.name} can't be honoured beside {', '.join(resizing)}: outputs that are kept would be of pictures of two sizes.",
                "Remove one of them.",
            )

    def among(self, spread: Spread) -> GatedAttention:
        """Raises: InputError: what is to be taken is of other rows."""
        kept, forms = self.outputs.rows, (self.self_attention, self.cross_attention)
        fits = len(kept) == len(spread.rows) if "taken" in forms else True
        if "taken_mean" in forms:
            fits = fits and {latent for _, latent in spread.rows} <= {latent for _, latent in kept}
        if not fits:
            raise InputError(
                f"T-Gate kept outputs of {len(kept)} rows, and takes them for {len(spread.rows)}.",
                "Sample one batch with one positive and one negative prompt.",
            )
        return replace(self, spread=spread)

    def on_unet(self, sites: UNetSites) -> None:
        for layer, form, at_places in (
            ("self", self.self_attention, sites.self_layer),
            ("cross", self.cross_attention, sites.cross_layer),
        ):
            if form != "computed":
                for place in self.places:
                    at_places[place].append(partial(self._gated, layer, form))

    def _gated(self, layer: str, form: KeptForm, inner: Inner, x_BLD: Tensor, at: At) -> Tensor:
        key = (layer, at.place)
        if form == "taken":
            return self.outputs.taken(key)
        if form == "taken_mean":
            own = self.spread.own
            return self.outputs.mean(key, self.spread.rows[own.start : own.stop])
        out = inner(x_BLD)
        self.outputs.keep(key, out, self.spread)
        return out
