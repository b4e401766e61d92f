"""Self-attentions whose tokens look at those of another row as well.

Source: StyleAligned (Hertz et al. 2023, arXiv 2312.02133), section 4, equations 3 to 5.
Shapes: B this rank's rows, S sources, L tokens of this rank's band, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.band import Band
from ..distributed.band_attention import attend_heads
from ..distributed.collectives import all_gather
from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import Row
from ..models.spread import chosen
from ..rpc.extras import SharedAttention
from .sources import FromSources, Sources, source_of
from .target import Target

_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class AttendedTogether(FromSources):
    """Of every self-attention of a UNet. `keys`: by row, whose keys it has beside its own, and what they are multiplied by.

    Comm: where sources are on other ranks, their tokens to all of these; keys and values of rows and sources from every band to all;
        where means are matched, two numbers for each channel of every row and source, from every band to all.
    """

    places: tuple[Place, ...]
    keys: Mapping[Row, tuple[Row, float]]
    matched: tuple[str, ...]
    name = "shared attention"

    @classmethod
    def read(cls, asked: SharedAttention, target: Target, range_of: dict[str, Any]) -> AttendedTogether:
        """Raises: InputError: rows that don't fit their sources."""
        assert target.unet is not None
        sources = source_of(asked.rows, asked.sources, cls.name)
        counts = {len(asked.rows), len(asked.key_sources), len(asked.key_weights)}
        if len(counts) != 1 or not set(asked.key_sources) <= set(asked.sources):
            raise InputError(
                f"Shared attention of {len(asked.rows)} rows has keys of {len(asked.key_sources)} with "
                f"{len(asked.key_weights)} weights.",
                "Give one weight and one source of keys for each row, from among the sources.",
            )
        keys = dict(zip(asked.rows, zip(asked.key_sources, asked.key_weights, strict=True), strict=True))
        places, matched = tuple(target.unet.places), tuple(asked.matched)
        if matched and any(target.sides_at(place) == (1, 1) for place in places):
            raise InputError(
                f"A latent of {target.height} x {target.width} has one token at the coarsest scale, which has no deviation.",
                "Choose a larger size.",
            )
        return cls(places=places, sources=sources, keys=keys, matched=matched, **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        sources = Sources.of(self.sources, self.spread, self.name)
        keys = [self.keys[row] for row in self.own_rows]
        shared = _Shared(
            sources,
            sources.numbers(self.sources[row] for row in self.own_rows),
            sources.numbers(row for row, _ in keys),
            [weight for _, weight in keys],
            self.matched,
        )
        for place in self.places:
            sites.self_projected[place].append(shared.project)
            sites.self_attended[place].append(_attended)


@dataclass(frozen=True)
class _Shared:
    """Of this rank's rows: which of the sources is theirs, whose keys they have, and with which weights."""

    sources: Sources
    own: list[int]
    keys: list[int]
    weights: list[float]
    matched: tuple[str, ...]

    def project(self, to_qkv: Inner, x_BLD: Tensor, at: At) -> Tensor:
        """(B, 2 * L, 3 * D): each row's own tokens, then those that it has of others, whose queries nobody asks for."""
        sources_SLD = self.sources.gather(x_BLD)
        own = self._projected(to_qkv, x_BLD, sources_SLD, at.band)
        queries, keys, values = to_qkv(sources_SLD).chunk(3, dim=-1)
        weighted = [keys[n : n + 1] * weight for n, weight in zip(self.keys, self.weights, strict=True)]
        others = torch.cat([chosen(queries, self.own), torch.cat(weighted), chosen(values, self.own)], dim=-1)
        return torch.cat([own, others], dim=1)

    def _projected(self, to_qkv: Inner, x_BLD: Tensor, sources_SLD: Tensor, band: Band) -> Tensor:
        if not self.matched:
            return to_qkv(x_BLD)
        mean, deviation = _moments(torch.cat([x_BLD, sources_SLD]), band)
        B = x_BLD.shape[0]
        their_mean, their_deviation = (chosen(moment[B:], self.own) for moment in (mean, deviation))
        changed = (x_BLD - mean[:B]) / deviation[:B] * their_deviation + their_mean
        projected = to_qkv(changed)
        if len(set(self.matched)) == len("qkv"):
            return projected
        pairs = zip("qkv", projected.chunk(3, dim=-1), to_qkv(x_BLD).chunk(3, dim=-1), strict=True)
        return torch.cat([new if name in self.matched else old for name, new, old in pairs], dim=-1)


def _attended(inner: Inner, qkv_BLD: Tensor, at: At) -> Tensor:
    """In place of `inner`: own queries, keys and values of both."""
    own = qkv_BLD.shape[1] // 2
    q_BLD, kv = qkv_BLD[:, :own, : qkv_BLD.shape[2] // 3], qkv_BLD[..., qkv_BLD.shape[2] // 3 :]
    tokens = [2 * count for count in at.band.tokens_like(q_BLD)]
    k, v = all_gather(kv, 1, tokens, at.band.axis).chunk(2, dim=-1)
    return attend_heads(at.kernel, at.heads, q_BLD, k, v)


def _moments(x_BLD: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """(B, 1, D) each: mean, and standard deviation by the unbiased variance, over the tokens of all bands."""
    tokens = band.tokens_like(x_BLD)
    x, total = x_BLD.float(), sum(tokens)
    mean = x.mean(1)
    own_12BD = torch.stack([mean, (x - mean[:, None]).square().sum(1)])[None]
    every = all_gather(own_12BD, 0, [1] * len(tokens), band.axis)
    whole = torch.stack([mean * (count / total) for count, (mean, _) in zip(tokens, every, strict=True)]).sum(0)
    # Around the common mean, so that nothing cancels (Chan et al. 1979).
    parts = [squares + (mean - whole).square() * count for count, (mean, squares) in zip(tokens, every, strict=True)]
    squares = torch.stack(parts).sum(0)
    deviation = (squares / (total - 1) + _EPSILON).sqrt()
    return whole[:, None].to(x_BLD.dtype), deviation[:, None].to(x_BLD.dtype)
