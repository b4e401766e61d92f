"""Self-attentions in tiles of queries, as ComfyUI's HyperTile has them.

Tokens are counted row by row. As a grid of h x w they are cut into nh * nw tiles of queries, also counted row by row. Keys and values
stay uncut, and are taken as so many strips of consecutive tokens: the queries of tile t look at strip t.
Shapes: B rows, L tokens of this rank's band, K all tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..distributed.band_attention import attend_heads
from ..distributed.collectives import all_gather
from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import TiledAttention
from .target import Target, check_known

# This band's queries in the order of their tiles, and back, (L,) each; how many each tile has of them; tokens in a strip.
Tiles: TypeAlias = tuple[Tensor, Tensor, tuple[int, ...], int]


@dataclass(frozen=True, kw_only=True)
class QueryTiles(Extra):
    """Tiles need not fit bands: each rank has of a tile the queries that are in its band.

    Comm: keys and values of every band to all.
    """

    tiles: Mapping[Place, Tiles]
    name = "HyperTile"

    @classmethod
    def read(cls, asked: TiledAttention, target: Target, range_of: dict[str, Any]) -> QueryTiles:
        """Raises: InputError: places that the model hasn't, or tiles that don't fit the latent."""
        check_known(asked.places, target.places, "transformer block", target)
        if len(asked.places) != len(asked.tiles):
            raise InputError(f"{len(asked.tiles)} tilings came for {len(asked.places)} places.", "Give one for each.")
        known: dict[Any, Tiles] = {}
        found = {}
        for place, tiling in zip(asked.places, asked.tiles, strict=True):
            sides, own = target.sides_at(place), target.own_tokens(place)
            if (
                min(tiling) < 1
                or sides[0] * sides[1] != tiling[2] * tiling[3]
                or tiling[2] % tiling[0]
                or tiling[3] % tiling[1]
            ):
                raise InputError(
                    f"{tiling[0]} x {tiling[1]} tiles of a grid of {tiling[2]} x {tiling[3]} don't fit the "
                    f"{sides[0]} x {sides[1]} tokens at {' '.join(map(str, place))}.",
                    "Give a grid of as many tokens, whose sides the tiles divide.",
                )
            key = (*tiling, own)
            if key not in known:
                known[key] = _tiles(*tiling, own, target.predictor.device)
            found[place] = known[key]
        return cls(tiles=found, **range_of)

    @property
    def has_sizes(self) -> bool:
        return True

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.tiles:
            sites.self_attended[place].append(self._tiled)

    def _tiled(self, inner: Inner, qkv_BLD: Tensor, at: At) -> Tensor:
        q, kv = qkv_BLD.tensor_split([qkv_BLD.shape[-1] // 3], dim=-1)
        whole = all_gather(kv, 1, at.band.tokens_like(kv), at.band.axis)
        return attended_in_tiles(self.tiles[at.place], q, whole, at)


def attended_in_tiles(tiles: Tiles, q_BLD: Tensor, kv_BKD: Tensor, at: At) -> Tensor:
    """(B, L, D): `kv` are keys and values of all tokens, strip after strip."""
    order, back, counts, strip = tiles
    of_tiles = zip(q_BLD[:, order].split(counts, dim=1), kv_BKD.split(strip, dim=1), strict=True)
    parts = [
        attend_heads(at.kernel, at.heads, of_tile, *of_strip.chunk(2, dim=-1))
        for of_tile, of_strip in of_tiles
        if of_tile.shape[1]
    ]
    return torch.cat(parts, dim=1)[:, back]


def tiles_of(tile_L: Tensor, tiles: int, strip: int, device: torch.device) -> Tiles:
    """`tile_L`: in which of so many tiles each of this rank's queries is."""
    order = tile_L.argsort(stable=True)
    counts = torch.bincount(tile_L, minlength=tiles).tolist()
    return order.to(device), order.argsort().to(device), tuple(counts), strip


def _tiles(nh: int, nw: int, h: int, w: int, own: range, device: torch.device) -> Tiles:
    tokens_L = torch.arange(own.start, own.stop)
    tile_L = (tokens_L // w) // (h // nh) * nw + (tokens_L % w) // (w // nw)
    return tiles_of(tile_L, nh * nw, h * w // (nh * nw), device)
