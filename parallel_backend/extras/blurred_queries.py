"""Self-attentions whose queries are blurred over the picture.

Source: smoothed energy guidance (Hong 2024, arXiv 2408.00760), section 4.2.
Shapes: B rows, L tokens of this rank's band, D width, N positions along a side, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.band import Band
from ..distributed.collectives import all_gather, start_all_reduce
from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import BlurQueries
from .target import Target, check_known

# In tokens, far beyond any picture's.
MOST_BLUR = 1e5


@dataclass(frozen=True, kw_only=True)
class BlurredQueries(Extra):
    """Keys and values stay as they are.

    Args:
        along: by place, what blurs along the picture's columns and along its rows, (N, N) each; None: the mean takes their place.
    Comm: the queries of every band to all; or for the mean, their sums.
    """

    along: Mapping[Place, tuple[Tensor, Tensor] | None]
    name = "smoothed energy guidance"

    @classmethod
    def read(cls, asked: BlurQueries, target: Target, range_of: dict[str, Any]) -> BlurredQueries:
        """Raises: InputError: places that the model hasn't, or a picture whose sides are too unlike to be blurred there."""
        check_known(asked.places, target.places, "transformer block", target)
        if asked.blur is not None and not 0 < asked.blur <= MOST_BLUR:
            raise InputError(
                f"Queries are to be blurred by {asked.blur}.",
                f"Give a number above 0, up to {MOST_BLUR:g}, or None for the mean.",
            )
        along = {place: _along(asked.blur, place, target) for place in asked.places}
        return cls(along=along, **range_of)

    @property
    def has_sizes(self) -> bool:
        return any(across is not None for across in self.along.values())

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.along:
            sites.self_attended[place].append(self._blurred)

    def _blurred(self, inner: Inner, qkv_BLD: Tensor, at: At) -> Tensor:
        q, kv = qkv_BLD.tensor_split([qkv_BLD.shape[-1] // 3], dim=-1)
        along = self.along[at.place]
        q = _mean(q, at.band) if along is None else _smoothed(q, at.band, *along)
        return inner(torch.cat([q, kv], dim=-1))


def _mean(q_BLD: Tensor, band: Band) -> Tensor:
    count = sum(band.tokens_like(q_BLD))
    total = start_all_reduce(q_BLD.sum(1, keepdim=True, dtype=torch.float32), band.axis).wait()
    return (total / count).to(q_BLD.dtype).expand_as(q_BLD)


def _smoothed(q_BLD: Tensor, band: Band, down_NN: Tensor, across_NN: Tensor) -> Tensor:
    tokens, (B, L, D), columns = band.tokens_like(q_BLD), q_BLD.shape, across_NN.shape[0]
    whole = all_gather(q_BLD, 1, tokens, band.axis)
    start = sum(tokens[: band.axis.rank])
    # The rows that hold this band's tokens.
    first, last = start // columns, -(-(start + L) // columns)
    rows = (down_NN[first:last] @ whole.reshape(B, -1, columns * D)).view(B, last - first, columns, D)
    return (across_NN @ rows).flatten(1, 2).narrow(1, start - first * columns, L)


def _along(blur: float | None, place: Place, target: Target) -> tuple[Tensor, Tensor] | None:
    if blur is None:
        return None
    rows, columns = _sides(place, target)
    taps = ceil(6 * blur) + 1 - ceil(6 * blur) % 2
    taps = min(taps, columns + 1 - columns % 2)
    if taps // 2 >= min(rows, columns):
        raise InputError(
            f"A blur of {taps} tokens is more than twice the {min(rows, columns)} that a side of this latent has at "
            f"{' '.join(map(str, place))}.",
            "Give a smaller blur, the mean (-1), or a larger latent.",
        )
    down, across = (target.here(_blur_along(side, taps, blur)) for side in (rows, columns))
    return down, across


def _sides(place: Place, target: Target) -> tuple[int, int]:
    """Rows and columns as the node takes them to be: of the latent's own ratio, where halvings may have rounded a side up."""
    true_rows, true_columns = target.sides_at(place)
    tokens, ratio = true_rows * true_columns, target.width / target.height
    if ratio >= 1:
        rows = round((tokens / ratio) ** 0.5)
        columns = tokens // rows
    else:
        columns = round((tokens * ratio) ** 0.5)
        rows = tokens // columns
    if rows * columns != tokens:
        raise InputError(
            f"{true_rows} x {true_columns} tokens can't be blurred as a latent of {target.height} x {target.width}.",
            f"Give it sides that divide by {2 ** (len(target.config.block_channels) - 1)}, or the mean (-1) for a blur.",
        )
    return rows, columns


def _blur_along(side: int, taps: int, blur: float) -> Tensor:
    """(side, side): row i has what each position gives to the i-th; the picture is mirrored at its edges."""
    half = (taps - 1) / 2
    kernel_K = torch.exp(-0.5 * (torch.linspace(-half, half, taps) / blur).square())
    kernel_K = kernel_K / kernel_K.sum()
    units = F.pad(torch.eye(side).unsqueeze(1), (taps // 2, taps // 2), mode="reflect")
    return F.conv1d(units, kernel_K.view(1, 1, -1)).squeeze(1).T.contiguous()
