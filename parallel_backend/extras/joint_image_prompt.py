"""Image prompts of an MMDiT: beside the joint attention, one of the image's queries to the image and to the prompt's tokens.

Source: InstantX's IP-Adapter for SD3.5.
Shapes: B rows, L this rank's tokens, T tokens of the image prompt, N heads of this tp rank, H head dim, F = N * H, K blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.collectives import split_range
from ..distributed.sites import TransformerSites
from ..errors import InputError
from ..models.extra import Extra, Row
from ..models.mmdit import EPS, HEAD_DIM
from ..models.transformer import Attend, Stream
from ..rpc.extras import JointImagePrompt
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class JointPrompt(Extra):
    """`norms` (K, 2, H); `by_branch` (rows, K, T, 2, N, H); `of_rows`, once these are known, (K, 2, B, T, N, H)."""

    blocks: tuple[int, ...]
    norms: Tensor
    by_branch: Mapping[int, Tensor]
    weight: float
    of_rows: Tensor | None = None
    name = "an image prompt"

    @classmethod
    def read(cls, asked: JointImagePrompt[Tensor], target: Target, range_of: dict[str, Any]) -> JointPrompt:
        """Raises: InputError: blocks that the model hasn't, or tensors of other sizes than its attentions'."""
        check_known(asked.blocks, range(target.config.depth), "joint block", target)
        heads, blocks = target.config.heads, len(asked.blocks)
        counts = {tensor.shape[2] for tensor in asked.keys_values.values() if tensor.ndim == 6}
        if len(set(asked.blocks)) < blocks or len(counts) > 1:
            raise InputError(
                f"An image prompt names blocks {asked.blocks}, with {sorted(counts)} tokens.",
                "Name each block once, and give every branch as many tokens.",
            )
        for tensor in asked.keys_values.values():
            sizes = list(tensor.shape)
            if tensor.ndim != 6 or 0 in sizes or sizes[1] != blocks or sizes[3:] != [2, heads, HEAD_DIM]:
                raise InputError(
                    f"An image prompt's keys and values have shape {sizes}; {blocks} blocks of this model need (rows, {blocks}, "
                    f"tokens, 2, {heads}, {HEAD_DIM}).",
                    f"Use an IP-Adapter that is made for {target.config.family}.",
                )
        if list(asked.norms.shape) != [blocks, 2, HEAD_DIM]:
            raise InputError(
                f"Norms of shape {list(asked.norms.shape)} came for {blocks} blocks.",
                f"Give ({blocks}, 2, {HEAD_DIM}).",
            )
        tp = target.predictor.mesh.tp
        own = slice(*split_range(heads, tp.degree, tp.rank))
        by_branch = {branch: target.here(kv[..., own, :]) for branch, kv in asked.keys_values.items()}
        norms = target.here(asked.norms)
        return cls(blocks=tuple(asked.blocks), norms=norms, by_branch=by_branch, weight=asked.weight, **range_of)

    def check(self, branches: Iterable[int]) -> None:
        for branch in branches:
            if branch not in self.by_branch:
                raise InputError(f"An image prompt came without keys and values of branch {branch}.", "Give them too.")

    def _chosen(self, rows: Sequence[Row]) -> JointPrompt:
        chosen = []
        for branch, number in rows:
            kv = self.by_branch[branch]
            chosen.append(kv[min(number, kv.shape[0] - 1)])
        return replace(self, by_branch={}, of_rows=torch.stack(chosen).permute(1, 3, 0, 2, 4, 5))

    def on_transformer(self, sites: TransformerSites) -> None:
        for place, block in enumerate(self.blocks):
            sites.beside[block].append(partial(self._beside, place))

    def _beside(self, place: int, attend: Attend, image: Stream) -> Tensor:
        """(B, L, F)."""
        assert self.of_rows is not None
        q, k = (_normed(x, norm, image.heads) for x, norm in zip(image.qkv_BLF[:2], image.norms_H, strict=True))
        norms = tuple(self.norms[place].unbind(0))
        again = Stream(q, k, image.v_BLF, image.heads, (norms[0], norms[1]))
        return attend.image_and(again, self.of_rows[place], EPS) * self.weight


def _normed(x_BLF: Tensor, norm_H: Tensor | None, heads: int) -> Tensor:
    """After the block's own norm of each head, if it has one."""
    if norm_H is None:
        return x_BLF
    return F.rms_norm(x_BLF.unflatten(-1, (heads, HEAD_DIM)), (HEAD_DIM,), norm_H, EPS).flatten(-2)
