"""Attention to pictures beside that to the prompt: IP-Adapter and its kin.

Sources: IP-Adapter (Ye et al. 2023, arXiv 2308.06721), equation 5; the orthogonal forms are PuLID's (Guo et al. 2024, arXiv
2404.16022), as its nodes for ComfyUI compute them.
Shapes: R rows that came, B rows of an evaluation, L this rank's tokens, T tokens of the picture, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..distributed.band_attention import attend_heads
from ..distributed.collectives import start_all_reduce
from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import UNCOND, Extra, Row
from ..rpc.extras import IDENTITY_TOKENS, ImagePrompt
from .regional_prompts import RegionalAttention
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class PromptedAttention(Extra, ABC):
    """What a picture's keys and values give is added to what the prompt's do, before the projection out.

    Args:
        rows: which evaluations' rows each row of the tensors is for; a number of None is for all latents.
        keys_values: (R, N), place after place (T, 2 * D). masks: (R, M), place after place a number for each token of the latent.
        ends: where each place's part of `keys_values` ends, and of `masks`.
        regions: of regional prompts beside it, those to whose outputs it is added; rows of uncond have the first alone.
    """

    places: tuple[Place, ...]
    tokens: tuple[int, ...]
    rows: tuple[tuple[int, int | None], ...]
    keys_values: Tensor
    masks: Tensor | None
    ends: tuple[tuple[int, int], ...]
    regions: tuple[int, ...] | None = None
    name = "an image prompt"

    @staticmethod
    def read(asked: ImagePrompt[Tensor], target: Target, range_of: dict[str, Any]) -> PromptedAttention:
        """Raises: InputError: places that the model hasn't, or tensors of another size."""
        check_known(asked.places, target.places, "transformer block", target)
        unet = target.unet
        assert unet is not None
        if len(asked.tokens) != len(asked.places) or any(count < 1 for count in asked.tokens):
            raise InputError(
                f"Counts of tokens {asked.tokens} came for {len(asked.places)} places.",
                "Give one for each, of one token or more.",
            )
        _check_regions(asked)
        widths = [unet.places[place].attn2.inner_dim for place in asked.places]
        sides = [target.sides_at(place) for place in asked.places]
        values = [2 * width * count for width, count in zip(widths, asked.tokens, strict=True)]
        cells = [rows * columns for rows, columns in sides]
        _check_size(asked.keys_values, len(asked.rows), sum(values), "keys and values")
        if asked.masks is not None:
            _check_size(asked.masks, len(asked.rows), sum(cells), "masks")
        return _FORMS[asked.form](
            places=tuple(asked.places),
            tokens=tuple(asked.tokens),
            rows=tuple(asked.rows),
            keys_values=target.here(asked.keys_values),
            masks=None if asked.masks is None else target.here(asked.masks),
            ends=tuple(zip(accumulate(values), accumulate(cells), strict=True)),
            regions=None if asked.regions is None else tuple(asked.regions),
            **range_of,
        )

    @property
    def has_sizes(self) -> bool:
        return self.masks is not None

    def check(self, branches: Iterable[int]) -> None:
        held = {branch for branch, _ in self.rows}
        for branch in branches:
            if branch not in held and (self._has_uncond or branch != UNCOND):
                raise InputError(f"An image prompt came without keys and values of branch {branch}.", "Give them too.")

    def check_beside(self, others: Sequence[Extra]) -> None:
        count = max((other.prompts for other in others if isinstance(other, RegionalAttention)), default=0)
        if self.regions is not None and max(self.regions) >= count:
            raise InputError(
                f"An image prompt is for the regional prompt {max(self.regions)}; {count} came.",
                "Name those that come with it, from 0.",
            )
        if self.regions is None and count:
            raise InputError("An image prompt came beside regional prompts.", "Say which of these it is for.")

    @property
    def _has_uncond(self) -> bool:
        """Whether it is for rows of uncond, too."""
        return self.regions is None or 0 in self.regions

    def _chosen(self, rows: Sequence[Row]) -> PromptedAttention:
        if not self._has_uncond:
            rows = [row for row in rows if row[0] != UNCOND]
        found = [self._row_of(*row) for row in rows]
        if found == list(range(len(self.rows))):
            return self
        masks = None if self.masks is None else self.masks[found]
        return replace(self, rows=tuple(rows), keys_values=self.keys_values[found], masks=masks)

    def _row_of(self, branch: int, number: int) -> int:
        """That latent's, or what is for all of them; of more latents than there are rows, the last one."""
        own = {n: i for i, (of, n) in enumerate(self.rows) if of == branch}
        return own.get(number, own.get(None, max(own.values())))

    def on_unet(self, sites: UNetSites) -> None:
        for number, place in enumerate(self.places):
            work = partial(self._attended, number)
            if self.regions is None:
                sites.cross_attended[place].append(work)
            for region in self.regions or ():
                sites.of_regions[place, region].append(work)

    def _attended(self, number: int, inner: Inner, q_BLD: Tensor, at: At) -> Tensor:
        first = self.ends[number - 1][0] if number else 0
        flat = self.keys_values[:, first : self.ends[number][0]]
        k_BTD, v_BTD = flat.unflatten(1, (self.tokens[number], -1)).chunk(2, dim=-1)
        out_BLD, found_BLD = inner(q_BLD), attend_heads(at.kernel, at.heads, q_BLD, k_BTD, v_BTD)
        added_BLD = self._added(out_BLD, found_BLD, q_BLD, k_BTD, at)
        if self.masks is not None:
            added_BLD = added_BLD * self._own_mask(self.masks, number, q_BLD, at)
        return out_BLD + added_BLD.to(out_BLD.dtype)

    def _own_mask(self, masks: Tensor, number: int, q_BLD: Tensor, at: At) -> Tensor:
        """(B, L, 1): that of this rank's band."""
        counts, rank = at.band.tokens_like(q_BLD), at.band.axis.rank
        first = (self.ends[number - 1][1] if number else 0) + sum(counts[:rank])
        return masks[:, first : first + counts[rank], None]

    @abstractmethod
    def _added(self, out_BLD: Tensor, found_BLD: Tensor, q_BLD: Tensor, k_BTD: Tensor, at: At) -> Tensor:
        """What comes to `out`, the attention so far, of what the picture's values gave."""


class AddedAttention(PromptedAttention):
    """As it is."""

    by_token = True

    def _added(self, out_BLD: Tensor, found_BLD: Tensor, q_BLD: Tensor, k_BTD: Tensor, at: At) -> Tensor:
        return found_BLD


class OrthogonalAttention(PromptedAttention):
    """That part of it which is orthogonal to the attention so far: of each channel, over all tokens of the whole latent.

    Comm: a sum of 2 * B * D numbers in fp32 over the bands, at each place.
    """

    name = "an image prompt's part that is orthogonal to the prompt's"

    def _added(self, out_BLD: Tensor, found_BLD: Tensor, q_BLD: Tensor, k_BTD: Tensor, at: At) -> Tensor:
        return self._less(out_BLD.float(), found_BLD.float(), 1.0, at)

    @staticmethod
    def _less(out_BLD: Tensor, found_BLD: Tensor, share: Tensor | float, at: At) -> Tensor:
        """`found` less this share of its projection on `out`."""
        products_B2D = torch.stack([(out_BLD * found_BLD).sum(1), (out_BLD * out_BLD).sum(1)], dim=1)
        both, square = start_all_reduce(products_B2D, at.band.axis).wait().unbind(1)
        return found_BLD - share * (both / square).unsqueeze(1) * out_BLD


class PartlyOrthogonalAttention(OrthogonalAttention):
    """As much of the other part stays as the share of attention, over all widths and tokens, that the first tokens get.

    Comm: a sum of B numbers more.
    """

    def _added(self, out_BLD: Tensor, found_BLD: Tensor, q_BLD: Tensor, k_BTD: Tensor, at: At) -> Tensor:
        share_BLT = (q_BLD @ k_BTD.transpose(1, 2)).float().softmax(-1)
        of_first_B = share_BLT[:, :, :IDENTITY_TOKENS].sum((1, 2))
        tokens = sum(at.band.tokens_like(q_BLD))
        kept_B = start_all_reduce(of_first_B, at.band.axis).wait() / tokens
        return self._less(out_BLD.float(), found_BLD.float(), (1 - kept_B)[:, None, None], at)


_FORMS: dict[str, type[PromptedAttention]] = {
    "added": AddedAttention,
    "orthogonal": OrthogonalAttention,
    "partly_orthogonal": PartlyOrthogonalAttention,
}


def _check_regions(asked: ImagePrompt[Tensor]) -> None:
    """Raises: InputError: numbers that are none of prompts, or rows of uncond beside what cond alone has."""
    regions = asked.regions
    if regions is None:
        return
    has_uncond = any(branch == UNCOND for branch, _ in asked.rows)
    if not regions or min(regions) < 0 or len(set(regions)) < len(regions) or (has_uncond and regions != [0]):
        raise InputError(
            f"An image prompt {'with rows of uncond ' if has_uncond else ''}is for regional prompts {regions}.",
            "Name each once, from 0; uncond has 0 alone, so that an image prompt with its rows is for no other.",
        )


def _check_size(tensor: Tensor, rows: int, expected: int, what: str) -> None:
    """Raises: InputError: of another size."""
    if tensor.shape != (rows, expected):
        raise InputError(
            f"An image prompt's {what} have shape {list(tensor.shape)}; at these places of this model and latent it is "
            f"{[rows, expected]}.",
            "Use an adapter that was made for this model.",
        )
