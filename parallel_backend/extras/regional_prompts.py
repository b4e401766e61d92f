"""Attention to several prompts, each for a region of the picture; and to a prompt whose tokens are keys or values alone.

Sources: latent couple at attention (laksjdjf's Attention Couple, hako-mikan's Regional Prompter); NegPiP (hako-mikan).
Shapes: B rows, L this rank's tokens, R prompts, T tokens of a prompt, E context width, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..distributed.band_attention import attend_heads
from ..distributed.sites import Around, At, Inner, Place, UNetSites, around
from ..errors import InputError
from ..models.extra import UNCOND, Extra, Row
from ..rpc.extras import RegionalPrompts, SplitPrompt
from .target import Target

# Of the sum of masks, which the coarsest dtype rounds.
_TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class RegionalAttention(Extra):
    """Rows of cond attend to several prompts, and each token takes of what each gives as much as its mask says.

    The other prompts' keys and values are made anew in each evaluation, with the weights as they are then: of SDXL at 1024 pixels
    one hundredth of it.

    Args:
        strength: of the row's own prompt, whose keys and values are times that.
        keys, values: the other prompts (1, T, E); no values where they are the same.
        masks: by scale, (R, tokens of the whole picture), the own prompt first; of each token they sum to 1.
        is_cond: of the rows. scales: `strength` of rows of cond, and 1 (B, 1, 1).
    """

    places: tuple[Place, ...]
    strength: float
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    is_cond: tuple[bool, ...] = ()
    scales: Tensor | None = None
    by_token = True
    name = "regional prompts"

    @classmethod
    def read(cls, asked: RegionalPrompts[Tensor], target: Target, range_of: dict[str, Any]) -> RegionalAttention:
        """Raises: InputError: prompts or masks that don't fit."""
        unet = target.unet
        assert unet is not None
        values = asked.values or []
        width = target.config.context_width
        if odd := [list(x.shape) for x in (*asked.keys, *values) if x.ndim != 3 or x.shape[::2] != (1, width)]:
            raise InputError(
                f"A regional prompt has shape {odd[0]}; this model needs (1, tokens, {width}).",
                "Encode it with this model's own text encoders.",
            )
        lengths, of_values = [x.shape[1] for x in asked.keys], [x.shape[1] for x in values]
        if not lengths or 0 in lengths or (values and of_values != lengths):
            raise InputError(
                f"Regional prompts have keys of {lengths} tokens and values of {of_values}.",
                "Give one prompt or more, and values of as many tokens as their keys, or none.",
            )
        for mask in asked.masks:
            _check_mask(mask, len(asked.keys) + 1)
        came = [mask.shape[1] for mask in asked.masks]
        if none := {prod(target.sides_at(place)) for place in unet.places} - set(came):
            raise InputError(
                f"Regional prompts have masks for {came} tokens, and none for {min(none)}.",
                "Give one for each scale of the picture at which this model attends to a prompt.",
            )
        return cls(
            places=tuple(unet.places),
            strength=asked.strength,
            keys=tuple(map(target.here, asked.keys)),
            values=tuple(map(target.here, values)),
            masks=tuple(map(target.here, asked.masks)),
            **range_of,
        )

    @property
    def has_sizes(self) -> bool:
        return True

    def _chosen(self, rows: Sequence[Row]) -> RegionalAttention:
        is_cond = tuple(branch != UNCOND for branch, _ in rows)
        if self.strength == 1.0:
            return replace(self, is_cond=is_cond)
        scales = [self.strength if cond else 1.0 for cond in is_cond]
        return replace(self, is_cond=is_cond, scales=self.keys[0].new_tensor(scales)[:, None, None])

    @property
    def prompts(self) -> int:
        """How many a row of cond attends to, its own included."""
        return len(self.keys) + 1

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.places:
            # Lists to which others may yet add.
            works = [sites.of_regions[place, number] for number in range(self.prompts)]
            sites.cross_attended[place].append(partial(self._attended, works))

    def _attended(self, works: Sequence[Sequence[Around]], inner: Inner, q_BLD: Tensor, at: At) -> Tensor:
        own_BLD = around(works[0], partial(self._own, inner), at)(q_BLD)
        runs = list(_runs(self.is_cond))
        conds = [slice(first, last) for first, last, cond in runs if cond]
        if not conds:
            return own_BLD
        # All at once: what acts around one of the prompts has a row for each of these.
        of_cond_BLD, q_of_cond_BLD = (torch.cat([x[run] for run in conds]) for x in (own_BLD, q_BLD))
        weighed_BLD = self._weighed(works, of_cond_BLD, q_of_cond_BLD, at)
        parts = iter(weighed_BLD.split([run.stop - run.start for run in conds]))
        return torch.cat([next(parts) if cond else own_BLD[first:last] for first, last, cond in runs])

    def _own(self, inner: Inner, q_BLD: Tensor) -> Tensor:
        # Attention to keys and values times s is that of queries times s, times s.
        return inner(q_BLD) if self.scales is None else inner(q_BLD * self.scales) * self.scales

    def _weighed(self, works: Sequence[Sequence[Around]], own_BLD: Tensor, q_BLD: Tensor, at: At) -> Tensor:
        own_mask, *masks = self._own_masks(q_BLD, at)
        out_BLD = own_BLD * own_mask
        for number, mask in enumerate(masks):
            other = around(works[number + 1], partial(self._other, number, at), at)
            out_BLD = out_BLD + other(q_BLD) * mask
        return out_BLD

    def _other(self, number: int, at: At, q_BLD: Tensor) -> Tensor:
        k_BTD, v_BTD = (x.expand(len(q_BLD), -1, -1) for x in self._keys_values(number, at))
        return attend_heads(at.kernel, at.heads, q_BLD, k_BTD, v_BTD)

    def _keys_values(self, number: int, at: At) -> tuple[Tensor, Tensor]:
        assert at.to_kv is not None
        k_1TD, v_1TD = at.to_kv(self.keys[number]).chunk(2, dim=-1)
        return (k_1TD, at.to_kv(self.values[number]).chunk(2, dim=-1)[1]) if self.values else (k_1TD, v_1TD)

    def _own_masks(self, q_BLD: Tensor, at: At) -> Tensor:
        """(R, L, 1): those of this rank's band."""
        counts, rank = at.band.tokens_like(q_BLD), at.band.axis.rank
        whole = next(mask for mask in self.masks if mask.shape[1] == sum(counts))
        return whole.narrow(1, sum(counts[:rank]), counts[rank])[..., None]


@dataclass(frozen=True, kw_only=True)
class SplitPromptAttention(Extra):
    """Tokens of even number are keys, those of odd number values."""

    places: tuple[Place, ...]
    by_token = True
    name = "NegPiP"

    @classmethod
    def read(cls, asked: SplitPrompt, target: Target, range_of: dict[str, Any]) -> SplitPromptAttention:
        unet = target.unet
        assert unet is not None
        return cls(places=tuple(unet.places), **range_of)

    def check_tokens(self, tokens: int) -> None:
        if tokens % 2:
            raise InputError(
                f"A prompt of {tokens} tokens can't be half keys and half values.",
                "Encode every prompt with the CLIP that NegPiP's node gives, and its MODEL with it.",
            )

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.places:
            # Within all others, which add to what it gives.
            sites.cross_attended[place].insert(0, _split)


def _split(inner: Inner, q_BLD: Tensor, at: At) -> Tensor:
    k_BTD, v_BTD = at.band.prompt_kv[at.slot].chunk(2, dim=-1)
    return attend_heads(at.kernel, at.heads, q_BLD, k_BTD[:, 0::2], v_BTD[:, 1::2])


def _runs(is_cond: Sequence[bool]) -> Iterator[tuple[int, int, bool]]:
    """First and one-past-last of rows that are alike."""
    first = 0
    for cond, alike in groupby(is_cond):
        last = first + len(list(alike))
        yield first, last, cond
        first = last


def _check_mask(mask: Tensor, prompts: int) -> None:
    """Raises: InputError: not one for each prompt, or of a sum that isn't 1."""
    if mask.ndim != 2 or mask.shape[0] != prompts:
        raise InputError(
            f"Masks of regional prompts have shape {list(mask.shape)}.", f"Give them the shape ({prompts}, tokens)."
        )
    sums = mask.float().sum(0)
    if not ((sums - 1).abs() <= _TOLERANCE).all():
        raise InputError(
            f"The masks of regional prompts sum to {float(sums.min()):g} to {float(sums.max()):g}.",
            "Let the masks cover the whole picture, and divide them by their sum.",
        )
