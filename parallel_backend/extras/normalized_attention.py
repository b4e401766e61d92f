"""What self-attentions give for cond, guided away from what they give for uncond; and the formula, for all that guide so.

Source: normalized attention guidance (Chen et al. 2025, arXiv 2505.21179), equations 6 to 9.
Shapes: B rows, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed.collectives import start_all_reduce
from ..distributed.mesh import MeshAxis
from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import COND, UNCOND, Extra
from ..models.spread import UNKNOWN, Spread
from ..rpc.extras import NormalizedGuidance
from .target import Target

_LEAST_NORM = 1e-6


@dataclass(frozen=True, kw_only=True)
class GuidedAway(Extra):
    """What an attention gives for one prompt, guided away from what it gives for another, in some form.

    Args:
        scale: 1 is no guidance. alpha: how much of the guided output is taken. tau: how much its L1 norm grows at most.
    """

    scale: float
    alpha: float
    tau: float
    name = "normalized attention guidance"

    def away(self, positive_BLD: Tensor, negative_BLD: Tensor, axis: MeshAxis | None = None) -> Tensor:
        """Guided, token by token.

        Args:
            axis: of the ranks that have the other channels; None where all of them are here.
        Comm: under such an axis a sum of 2 * B * L numbers.
        """
        guided = positive_BLD * self.scale - negative_BLD * (self.scale - 1)
        norms_BL2 = torch.cat([x.norm(p=1, dim=-1, keepdim=True) for x in (positive_BLD, guided)], dim=-1)
        if axis is not None:
            norms_BL2 = start_all_reduce(norms_BL2, axis).wait()
        before, after = norms_BL2.clamp_min(_LEAST_NORM).split(1, dim=-1)
        growth = after / before
        return guided * (growth.clamp(max=self.tau) / growth) * self.alpha + positive_BLD * (1 - self.alpha)


def settings_of(asked: Any) -> dict[str, Any]:
    """Those of `GuidedAway` as a request names them. Raises: InputError: a limit that is none."""
    if not asked.tau >= 0:
        raise InputError(
            f"tau={asked.tau} of normalized attention guidance is no limit.", "Use 1 or more; 1.5 to 2.5 are usual."
        )
    return {"scale": asked.scale, "alpha": asked.alpha, "tau": asked.tau}


@dataclass(frozen=True, kw_only=True)
class NormalizedAttention(GuidedAway):
    """Of every self-attention of a UNet, projection out included.

    Args:
        places: all that the model has.
        spread: where rows of both prompts are.
    Comm: where they are on several ranks, what each attention gives for every row to all of these.
    """

    places: tuple[Place, ...]
    spread: Spread = UNKNOWN
    by_token = True
    pairs = True

    @classmethod
    def read(cls, asked: NormalizedGuidance, target: Target, range_of: dict[str, Any]) -> NormalizedAttention:
        assert target.unet is not None
        return cls(places=tuple(target.unet.places), **settings_of(asked), **range_of)

    def among(self, spread: Spread) -> NormalizedAttention:
        return replace(self, spread=spread)

    def on_unet(self, sites: UNetSites) -> None:
        partners = _partners(self.spread)
        if not partners:
            return
        own = [(here, partners[number]) for here, number in enumerate(self.spread.own) if number in partners]
        for place in self.places:
            sites.self_layer[place].append(partial(self._guided, own))

    def _guided(self, own: Sequence[tuple[int, int]], inner: Inner, x_BLD: Tensor, at: At) -> Tensor:
        out = inner(x_BLD)
        every = self.spread.gather(out)
        rows = list(out.split(1))
        for here, partner in own:
            rows[here] = self.away(rows[here], every[partner : partner + 1])
        return torch.cat(rows)


def _partners(spread: Spread) -> dict[int, int]:
    """By the number of a cond row among all, that of uncond's row of the same latent; of rows that come twice, only the first."""
    first: dict[tuple[int, int], int] = {}
    for number, row in enumerate(spread.rows):
        first.setdefault(row, number)
    return {
        number: first[UNCOND, latent]
        for (branch, latent), number in first.items()
        if branch == COND and (UNCOND, latent) in first
    }
