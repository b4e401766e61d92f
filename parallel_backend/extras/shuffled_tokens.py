"""Transformer blocks of a UNet to which tokens come in another order.

Source: token perturbation guidance (Rajabi et al. 2025, arXiv 2506.10036).
Shapes: B rows, L tokens of this rank's band, K all tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..distributed.band import Band
from ..distributed.collectives import all_gather
from ..distributed.sites import Place, UNetSites
from ..errors import InputError
from ..models.extra import Extra
from ..rpc.extras import ShuffledTokens
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class TokenOrders(Extra):
    """They stay in that order: what the block adds to them, it adds there.

    Args:
        sources: by place, which of all tokens come to those of this rank's band, (L,).
    Comm: the tokens of every band to all.
    """

    sources: Mapping[Place, Tensor]
    name = "shuffled tokens"

    @classmethod
    def read(cls, asked: ShuffledTokens[Tensor], target: Target, range_of: dict[str, Any]) -> TokenOrders:
        """Raises: InputError: places that the model hasn't, or what is no order of the tokens there."""
        check_known(asked.places, target.places, "transformer block", target)
        counts = [prod(target.sides_at(place)) for place in asked.places]
        orders = asked.orders
        if orders.dtype != torch.int64 or list(orders.shape) != [sum(counts)]:
            raise InputError(
                f"An order of {list(orders.shape)} tokens came as {orders.dtype}; this latent has {sum(counts)} at the "
                f"{len(counts)} blocks that are named.",
                f"Give ({sum(counts)},) of int64: of every block each token's number once.",
            )
        sources = {}
        for place, order in zip(asked.places, orders.split(counts), strict=True):
            if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
                raise InputError(
                    f"The order of tokens at {' '.join(map(str, place))} doesn't name each of the {len(order)} once.",
                    "Give a permutation, as torch.randperm makes them.",
                )
            own = target.own_tokens(place)
            sources[place] = order[own.start : own.stop].to(target.predictor.device, copy=True)
        return cls(sources=sources, **range_of)

    @property
    def has_sizes(self) -> bool:
        return True

    def on_unet(self, sites: UNetSites) -> None:
        for place, sources in self.sources.items():
            sites.block_input[place].append(partial(_shuffled, sources))


def _shuffled(sources_L: Tensor, x_BLD: Tensor, band: Band) -> Tensor:
    return all_gather(x_BLD, 1, band.tokens_like(x_BLD), band.axis)[:, sources_L]
