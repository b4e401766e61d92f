"""Attentions to the prompt whose scores are led away from softmax, towards a map that gives most tokens of the prompt nothing.

Sources: PLADIS (Kim and Sim 2025, arXiv 2503.07677); the maps: sparsemax (Martins and Astudillo 2016, arXiv 1602.02068),
algorithm 1, and 1.5-entmax (Peters et al. 2019, arXiv 1905.05702), algorithm 2.
Shapes: B rows, L this rank's tokens, T tokens of the prompt, N heads, H head dim, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import SparseAttention
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class SparseCrossAttention(Extra):
    """A band's queries, which see the whole prompt: ranks tell each other nothing."""

    places: tuple[Place, ...]
    scale: float
    sparse: str
    by_token = True
    name = "sparse attention"

    @classmethod
    def read(cls, asked: SparseAttention, target: Target, range_of: dict[str, Any]) -> SparseCrossAttention:
        """Raises: InputError: places that the model hasn't, or a map that isn't known."""
        check_known(asked.places, target.places, "transformer block", target)
        if asked.sparse not in SPARSE_MAPS:
            raise InputError(
                f"There is no map {asked.sparse!r} of attention scores.", f"Use one of {', '.join(SPARSE_MAPS)}."
            )
        return cls(places=tuple(asked.places), scale=asked.scale, sparse=asked.sparse, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.places:
            sites.cross_attended[place].append(self._attended)

    def _attended(self, inner: Inner, q_BLD: Tensor, at: At) -> Tensor:
        kv = at.band.prompt_kv[at.slot].chunk(2, dim=-1)
        q_BNLH, k_BNTH, v_BNTH = (x.unflatten(-1, (at.heads, -1)).transpose(1, 2) for x in (q_BLD, *kv))
        # In fp32: the maps take sums over sorted scores.
        scores_BNLT = (q_BNLH @ k_BNTH.transpose(-2, -1)).float() * q_BNLH.shape[-1] ** -0.5
        shares = SPARSE_MAPS[self.sparse](scores_BNLT) * self.scale
        shares += scores_BNLT.softmax(dim=-1) * (1 - self.scale)
        return (shares.to(v_BNTH.dtype) @ v_BNTH).transpose(1, 2).flatten(2)


def sparsemax(scores: Tensor) -> Tensor:
    """The point nearest to `scores` among those of the last dim whose entries are positive and sum to 1."""
    shifted = scores - scores.amax(-1, keepdim=True)
    sorted_, counts = shifted.sort(dim=-1, descending=True).values, _counts_like(shifted)
    # What the k greatest would all lose, if they were those that stay.
    losses = (sorted_.cumsum(-1) - 1) / counts
    return (shifted - _of_support(losses, losses < sorted_)).clamp(min=0)


def entmax15(scores: Tensor) -> Tensor:
    """Between softmax and `sparsemax`: squares of what of halved scores is above a threshold, which makes them sum to 1."""
    halved = (scores - scores.amax(-1, keepdim=True)) / 2
    sorted_, counts = halved.sort(dim=-1, descending=True).values, _counts_like(halved)
    mean, mean_square = sorted_.cumsum(-1) / counts, sorted_.square().cumsum(-1) / counts
    spread = mean_square - mean.square()
    thresholds = mean - (1 / counts - spread).clamp(min=0).sqrt()
    return (halved - _of_support(thresholds, thresholds <= sorted_)).clamp(min=0).square()


def _counts_like(x: Tensor) -> Tensor:
    """1, 2, ... along the last dim."""
    return torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)


def _of_support(by_count: Tensor, is_in: Tensor) -> Tensor:
    """The entry of `by_count` for as many as are in."""
    return by_count.gather(-1, is_in.sum(-1, keepdim=True) - 1)


SPARSE_MAPS: Mapping[str, Callable[[Tensor], Tensor]] = {"entmax1.5": entmax15, "sparsemax": sparsemax}
