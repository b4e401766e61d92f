"""Self-attentions in which each token sees itself alone.

Source: perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..distributed.sites import At, Inner, Place, UNetSites
from ..models.extra import Extra
from ..rpc.extras import PerturbedAttention
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class IdentityAttention(Extra):
    """What goes to the projection out are the values themselves."""

    places: tuple[Place, ...]
    by_token = True
    omits_attention = True
    name = "perturbed attention"

    @classmethod
    def read(cls, asked: PerturbedAttention, target: Target, range_of: dict[str, Any]) -> IdentityAttention:
        """Raises: InputError: places that the model hasn't."""
        check_known(asked.places, target.places, "transformer block", target)
        return cls(places=tuple(asked.places), **range_of)

    def on_unet(self, sites: UNetSites) -> None:
        for place in self.places:
            sites.self_attended[place].append(_values)


def _values(inner: Inner, qkv_BLD: Tensor, at: At) -> Tensor:
    return qkv_BLD.chunk(3, dim=-1)[2]
