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

# Of the layer norm of an image prompt's tokens, as of all others.
_TOKEN_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class JointAdapter(Extra):
    """What makes an image prompt's keys and values of its tokens at a sigma, before each evaluation.

    With B rows, T tokens and K blocks of SD3.5-Large it is B * T * K * 24 million operations over all tp ranks, a thousandth of the
    evaluation.

    Args:
        blocks: those of this stage. norms: (K, 3, H). matrices: of each (2 * F, E).
        tokens: by branch (sigmas, rows, T, E). modulation: by branch (sigmas, rows, K, 2, E).
        sigmas: none of what acts everywhere. rows: of an evaluation, once they are known.
    """

    blocks: tuple[int, ...]
    norms: Tensor
    matrices: tuple[Tensor, ...]
    tokens: Mapping[int, Tensor]
    modulation: Mapping[int, Tensor]
    sigmas: tuple[float, ...]
    weight: float
    rows: tuple[Row, ...] = ()
    name = "an image prompt"

    @classmethod
    def read(cls, asked: JointImagePrompt[Tensor], target: Target, range_of: dict[str, Any]) -> JointAdapter:
        """Raises: InputError: blocks that the model hasn't, or tensors of other sizes than its attentions'."""
        _check(asked, target)
        model, tp = target.mmdit, target.predictor.mesh.tp
        assert model is not None
        places = [place for place, block in enumerate(asked.blocks) if block in model.own_blocks]
        heads = slice(*split_range(target.config.heads, tp.degree, tp.rank))

        def own_rows(matrices: Tensor) -> Tensor:
            by_head = matrices.unflatten(1, (target.config.heads, HEAD_DIM))
            return target.here(by_head[:, heads]).flatten(0, 2)

        return cls(
            blocks=tuple(asked.blocks[place] for place in places),
            norms=target.here(torch.stack([*asked.norms])[places]),
            matrices=tuple(target.once(asked.matrices[place], own_rows) for place in places),
            tokens={branch: target.here(tokens) for branch, tokens in asked.tokens.items()},
            modulation={branch: target.here(both[:, :, places]) for branch, both in asked.modulation.items()},
            sigmas=tuple(asked.sigmas),
            weight=asked.weight,
            **range_of,
        )

    def is_at(self, sigma: float | None) -> bool:
        return super().is_at(sigma) and (sigma is None or not self.sigmas or sigma in self.sigmas)

    def check(self, branches: Iterable[int]) -> None:
        for branch in branches:
            if branch not in self.tokens:
                raise InputError(f"An image prompt came without tokens of branch {branch}.", "Give them too.")

    def _chosen(self, rows: Sequence[Row]) -> JointAdapter:
        return replace(self, rows=tuple(rows))

    def at(self, sigma: float | None) -> Extra:
        if not self.blocks:  # in other stages
            return Extra()
        step = self.sigmas.index(sigma) if sigma is not None and self.sigmas else 0
        tokens_BTE, shift_and_scale = (
            self._of_rows_at(step, by_branch) for by_branch in (self.tokens, self.modulation)
        )
        shift_KB1E, scale_KB1E = shift_and_scale.permute(2, 1, 0, 3).unsqueeze(3).unbind(0)
        normed_BTE = F.layer_norm(tokens_BTE, tokens_BTE.shape[-1:], eps=_TOKEN_EPS)
        taken_KBTE = normed_BTE * (1 + scale_KB1E) + shift_KB1E
        pairs = zip(taken_KBTE, self.matrices, strict=True)
        made = torch.stack([F.linear(taken_BTE, both) for taken_BTE, both in pairs])
        k_KBTNH, v_KBTNH = made.unflatten(3, (2, -1, HEAD_DIM)).unbind(3)
        k_KBTNH = F.rms_norm(k_KBTNH, (HEAD_DIM,), eps=EPS) * self.norms[:, None, None, 2:]
        of_rows = torch.stack([k_KBTNH, v_KBTNH], dim=1)
        own = {"start": self.start, "end": self.end, "weight": self.weight}
        return JointPrompt(blocks=self.blocks, norms=self.norms[:, :2], of_rows=of_rows, **own)

    def _of_rows_at(self, step: int, by_branch: Mapping[int, Tensor]) -> Tensor:
        chosen = []
        for branch, number in self.rows:
            of_latents = by_branch[branch][step]
            chosen.append(of_latents[min(number, len(of_latents) - 1)])
        return torch.stack(chosen)


@dataclass(frozen=True, kw_only=True)
class JointPrompt(Extra):
    """As it is evaluated: `norms` (K, 2, H) of the image's queries and keys, `of_rows` (K, 2, B, T, N, H) keys and values."""

    blocks: tuple[int, ...]
    norms: Tensor
    of_rows: Tensor
    weight: float
    name = "an image prompt"

    def on_transformer(self, sites: TransformerSites) -> None:
        for place, block in enumerate(self.blocks):
            sites.beside[block].append(partial(self._beside, place))

    def _beside(self, place: int, attend: Attend, image: Stream) -> Tensor:
        """(B, L, F)."""
        q, k = (_normed(x, norm, image.heads) for x, norm in zip(image.qkv_BLF[:2], image.norms_H, strict=True))
        norms = tuple(self.norms[place].unbind(0))
        again = Stream(q, k, image.v_BLF, image.heads, (norms[0], norms[1]))
        return attend.image_and(again, self.of_rows[place], EPS) * self.weight


def _normed(x_BLF: Tensor, norm_H: Tensor | None, heads: int) -> Tensor:
    """After the block's own norm of each head, if it has one."""
    if norm_H is None:
        return x_BLF
    return F.rms_norm(x_BLF.unflatten(-1, (heads, HEAD_DIM)), (HEAD_DIM,), norm_H, EPS).flatten(-2)


def _check(asked: JointImagePrompt[Tensor], target: Target) -> None:
    """Raises: InputError: as `JointAdapter.read` says."""
    check_known(asked.blocks, range(target.config.depth), "joint block", target)
    blocks, heads = len(asked.blocks), target.config.heads
    if len(set(asked.blocks)) < blocks or asked.tokens.keys() != asked.modulation.keys() or not asked.tokens:
        raise InputError(
            f"An image prompt names blocks {asked.blocks}, tokens of branches {sorted(asked.tokens)} and shifts and scales of "
            f"{sorted(asked.modulation)}.",
            "Name each block once, and give every branch both.",
        )
    if not blocks or len(asked.norms) != blocks or len(asked.matrices) != blocks:
        raise InputError(
            f"An image prompt has norms of {len(asked.norms)} and matrices of {len(asked.matrices)} blocks, and names {blocks}.",
            "Give both for each block, and one block or more.",
        )
    width = asked.matrices[0].shape[-1] if asked.matrices[0].ndim else 0
    counts = {tokens.shape[2] for tokens in asked.tokens.values() if tokens.ndim == 4}
    steps, tokens = max(len(asked.sigmas), 1), min(counts, default=0)
    expected: list[tuple[str, Tensor, list[int]]] = [
        *(("norms", own, [3, HEAD_DIM]) for own in asked.norms),
        *(("matrices", own, [2, heads * HEAD_DIM, width]) for own in asked.matrices),
    ]
    for branch, own in asked.tokens.items():
        rows = own.shape[1] if own.ndim > 1 else 0
        expected.append((f"tokens of branch {branch}", own, [steps, max(rows, 1), max(tokens, 1), width]))
        both = asked.modulation[branch]
        expected.append((f"shifts and scales of branch {branch}", both, [steps, max(rows, 1), blocks, 2, width]))
    for what, tensor, shape in expected:
        if list(tensor.shape) != shape or 0 in shape:
            raise InputError(
                f"An image prompt's {what} have shape {list(tensor.shape)}; for {blocks} blocks of this model and {steps} sigmas "
                f"it is {shape}.",
                f"Use an IP-Adapter that is made for {target.config.family}.",
            )
