"""How much each token is looked at in a self-attention, reported of uncond's rows.

Source: self-attention guidance (Hong et al. 2023, arXiv 2210.00939), section 4.2.
Shapes: B rows, L tokens of this rank's band, K all tokens, N heads, H head dim, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import all_gather, start_all_reduce
from ..distributed.sites import At, Inner, Place, UNetSites
from ..models.extra import UNCOND, Row
from ..models.reports import ReportingExtra
from ..rpc.extras import ReportScores
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class AttentionScores(ReportingExtra):
    """The attention itself stays as it is.

    Args:
        uncond: which of this rank's rows are.
    Comm: their keys from every band to all, and sums of one number for each token of the picture.
    """

    place: Place
    uncond: tuple[int, ...] = ()
    name = "self-attention guidance"

    @classmethod
    def read(cls, asked: ReportScores, target: Target, range_of: dict[str, Any]) -> AttentionScores:
        """Raises: InputError: a place that the model hasn't."""
        check_known([asked.place], target.places, "transformer block", target)
        rows, columns = target.sides_at(asked.place)
        return cls(place=asked.place, width=rows * columns, **range_of)

    @property
    def has_sizes(self) -> bool:
        return True

    def _chosen(self, rows: Sequence[Row]) -> AttentionScores:
        return replace(self, uncond=tuple(i for i, (branch, _) in enumerate(rows) if branch == UNCOND))

    def on_unet(self, sites: UNetSites) -> None:
        sites.self_attended[self.place].append(self._noted_of)

    def _noted_of(self, inner: Inner, qkv_BLD: Tensor, at: At) -> Tensor:
        found = qkv_BLD.new_zeros(qkv_BLD.shape[0], self.width, dtype=torch.float32)
        if self.uncond:
            # Row by row: a list of them would be copied to the GPU, and waited for.
            looked_at = _looked_at(torch.cat([qkv_BLD[row : row + 1] for row in self.uncond]), at)
            for row, scores_K in zip(self.uncond, looked_at.unbind(), strict=True):
                found[row] = scores_K
        self.note(found)
        return inner(qkv_BLD)


def _looked_at(qkv_BLD: Tensor, at: At) -> Tensor:
    q, k, _ = qkv_BLD.chunk(3, dim=-1)
    k = all_gather(k, 1, at.band.tokens_like(qkv_BLD), at.band.axis)
    heads_of_q, heads_of_k = (x.float().unflatten(-1, (at.heads, -1)).unbind(2) for x in (q, k))
    scale = heads_of_q[0].shape[-1] ** -0.5
    total_BK = q.new_zeros(k.shape[:2], dtype=torch.float32)
    # Head by head: the table of one is as large as all queries times all keys.
    for q_BLH, k_BKH in zip(heads_of_q, heads_of_k, strict=True):
        total_BK += (q_BLH @ k_BKH.transpose(1, 2) * scale).softmax(dim=-1).sum(1)
    return start_all_reduce(total_BK / at.heads, at.band.axis).wait()
