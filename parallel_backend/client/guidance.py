"""Guidance that needs more than two prompts or numbers, as clients ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..guidance_spec import AwayFromWeaker
from ..rpc.conditioning import Conditioning
from ..rpc.extras import AnyExtra


@dataclass(frozen=True)
class PerpNeg:
    """A negative prompt takes away only what the positive one doesn't ask for; an empty prompt stands between them.

    Source: Armandpour et al. 2023 (arXiv 2304.04968).

    Args:
        number: the empty prompt's, for extras that differ by prompt.
    """

    empty: Conditioning
    neg_scale: float = 1.0
    number: int = 2


@dataclass(frozen=True)
class WeakerModel:
    """Guidance away from what the model makes of the positive prompt with these extras inside.

    Skip-layer guidance (SkipBlocks) and perturbed-attention guidance (PerturbedAttention) are of this kind.
    """

    extras: Sequence[AnyExtra]
    guidance: AwayFromWeaker
