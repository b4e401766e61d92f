"""Self-attentions in shifted windows, two by two of them: MSW-MSA.

Source: HiDiffusion (Zhang et al. 2023, arXiv 2311.17528), section 3.3, as comfyui_jankhidiffusion has it.
Shapes: B rows, L tokens of this rank's band or share, K all tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..distributed.collectives import all_gather, split_sizes
from ..distributed.resize import resized
from ..distributed.sites import At, BlockName, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import ShiftedWindows
from .deep_shrink import check_methods
from .target import Target, check_known
from .tiled_attention import Tiles, attended_in_tiles, tiles_of

# Rows and columns as which tokens are counted, and by how many windows are shifted down and right.
Window: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class WindowedAttention(Extra):
    """Windows need not fit bands: each rank has of a window the queries that are in its band. Where tokens are resized, ranks share
    out the resized ones evenly.

    Comm: keys and values of every band to all; where tokens are resized, tokens and outputs as well.
    """

    windows: Mapping[Place, Window]
    method: str
    back: str
    gains: tuple[float, float, float, float]
    # By window and own tokens, how these lie in it, and the order of all keys.
    _known: dict[tuple[int, int, int, int, int, int], tuple[Tiles, Tensor]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    name = "MSW-MSA"
    is_drawn = True

    @classmethod
    def read(cls, asked: ShiftedWindows, target: Target, range_of: dict[str, Any]) -> WindowedAttention:
        """Raises: InputError: places that the model hasn't, windows of no tokens, or a method that there isn't."""
        check_known(asked.places, target.places, "transformer block", target)
        check_methods(asked.method, asked.back)
        if len(asked.places) != len(asked.windows):
            raise InputError(f"{len(asked.windows)} windows came for {len(asked.places)} places.", "Give one for each.")
        for place, (rows, columns, down, right) in zip(asked.places, asked.windows, strict=True):
            if not (rows > 0 <= down and columns > 0 <= right):
                raise InputError(
                    f"Windows of {rows} x {columns} tokens, shifted by {down} and {right}, came for {_told(place)}.",
                    "Give sides above 0, and shifts of 0 or more.",
                )
        windows = dict(zip(asked.places, asked.windows, strict=True))
        return cls(windows=windows, method=asked.method, back=asked.back, gains=asked.gains, **range_of)

    def check_inside(self, sides: Mapping[BlockName, tuple[int, int]]) -> None:
        for place, (rows, columns, *_) in self.windows.items():
            height, width = sides[place[:2]]
            if rows * columns != height * width:
                raise InputError(
                    f"Windows of {rows} x {columns} tokens came for the {height} x {width} tokens at {_told(place)}.",
                    "Give as many tokens as there are.",
                )

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.windows:
            sites.self_attended[place].append(self._windowed)
            sites.self_layer[place].append(self._resized)

    def _resized(self, layer: Inner, x_BLD: Tensor, at: At) -> Tensor:
        (rows, columns, *_), (before, cut, joined, after) = self.windows[at.place], self.gains
        even = _even(rows, columns)
        if even == (rows, columns):
            return _times(layer(_times(x_BLD, before * cut)), joined * after)
        tokens, axis = at.band.tokens_like(x_BLD), at.band.axis
        whole = _tokens_resized(all_gather(_times(x_BLD, before), 1, tokens, axis), (rows, columns), even, self.method)
        shares = split_sizes(even[0] * even[1], axis.degree)
        own = whole.split(shares, dim=1)[axis.rank]
        out = all_gather(_times(layer(_times(own, cut)), joined), 1, shares, axis)
        return _times(_tokens_resized(out, even, (rows, columns), self.back).split(tokens, dim=1)[axis.rank], after)

    def _windowed(self, inner: Inner, qkv_BLD: Tensor, at: At) -> Tensor:
        rows, columns, down, right = self.windows[at.place]
        even, axis = _even(rows, columns), at.band.axis
        counts = (
            at.band.tokens_like(qkv_BLD) if even == (rows, columns) else split_sizes(even[0] * even[1], axis.degree)
        )
        q, kv = qkv_BLD.tensor_split([qkv_BLD.shape[-1] // 3], dim=-1)
        whole = all_gather(kv, 1, counts, axis)
        key = (*even, down, right, sum(counts[: axis.rank]), q.shape[1])
        if key not in self._known:
            self._known[key] = _tiles(q.device, *key)
        tiles, keys_K = self._known[key]
        return attended_in_tiles(tiles, q, whole[:, keys_K], at)


def _tiles(
    device: torch.device, rows: int, columns: int, down: int, right: int, first: int, own: int
) -> tuple[Tiles, Tensor]:
    """Of `own` tokens from the `first` on: in which window each is; and all tokens, window after window."""
    tokens_K = torch.arange(rows * columns)
    row_K, column_K = (tokens_K // columns - down) % rows, (tokens_K % columns - right) % columns
    window_K = row_K // (rows // 2) * 2 + column_K // (columns // 2)
    tiles = tiles_of(window_K[first : first + own], 4, rows * columns // 4, device)
    return tiles, window_K.argsort(stable=True).to(device)


def _times(x: Tensor, gain: float) -> Tensor:
    return x if gain == 1 else x * gain


def _even(rows: int, columns: int) -> tuple[int, int]:
    return rows + rows % 2, columns + columns % 2


def _tokens_resized(x_BKD: Tensor, sides: tuple[int, int], wanted: tuple[int, int], method: str) -> Tensor:
    """Tokens of a grid of `sides`, row by row, as those of one of `wanted`."""
    image = x_BKD.transpose(1, 2).unflatten(2, sides).contiguous()
    return resized(image, *wanted, method).flatten(2).transpose(1, 2)


def _told(place: Place) -> str:
    return " ".join(map(str, place))
