"""An image in another size, by the methods that ComfyUI's nodes name.

Shapes: B batch, C channels, Y rows, X columns, N places along the side that changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's own by the same name, and one that interpolates directions of channels.
METHODS = ("nearest", "nearest-exact", "bilinear", "bicubic", "area", "bislerp")
# So near to 1 is the cosine of two directions that are taken for one, and to -1 that of opposite ones.
NEARLY = 1e-5


def resized(x_BCYX: Tensor, height: int, width: int, method: str) -> Tensor:
    """(B, C, height, width), in the dtype of x. Corners are not aligned, and nothing is smoothed before it shrinks."""
    if method != "bislerp":
        return F.interpolate(x_BCYX, size=(height, width), mode=method)
    x = x_BCYX.float()
    for dim, side in ((3, width), (2, height)):
        x = _slerped(x, dim, side)
    return x.to(x_BCYX.dtype)


def _slerped(x_BCYX: Tensor, dim: int, side: int) -> Tensor:
    """`x` with `side` values along `dim`: between two neighbours, the vector of channels turns from one to the other.

    Its length goes linearly from one's to the other's. Source: Shoemake 1985 (spherical linear interpolation).
    """
    places_N = torch.arange(x_BCYX.shape[dim], dtype=torch.float32, device=x_BCYX.device)
    at_N, after_N = (_between(places, side) for places in (places_N, (places_N + 1).clamp(max=len(places_N) - 1)))
    a, b = (x_BCYX.index_select(dim, places.long()).movedim(1, -1) for places in (at_N, after_N))
    share = (at_N - at_N.floor()).view([-1, 1] if dim == 3 else [-1, 1, 1])
    length_a, length_b = (v.norm(dim=-1, keepdim=True) for v in (a, b))
    unit_a, unit_b = (torch.where(length == 0, 0.0, v / length) for v, length in ((a, length_a), (b, length_b)))
    cosine = (unit_a * unit_b).sum(-1, keepdim=True)
    angle = torch.acos(cosine)
    turned = (torch.sin((1 - share) * angle) * unit_a + torch.sin(share * angle) * unit_b) / torch.sin(angle)
    turned = turned * (length_a * (1 - share) + length_b * share)
    out = torch.where(cosine > 1 - NEARLY, a, turned)
    out = torch.where(cosine < NEARLY - 1, torch.lerp(a, b, share), out)
    return out.movedim(-1, 1)


def _between(values_N: Tensor, side: int) -> Tensor:
    """(side,): interpolated linearly."""
    return F.interpolate(values_N.view(1, 1, 1, -1), size=(1, side), mode="bilinear").flatten()
