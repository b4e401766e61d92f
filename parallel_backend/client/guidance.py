"""Guidance that needs more than two prompts or numbers, as clients ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..config import SamplerSpec
from ..config.guidance import AwayFromWeaker
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


def settings_of(spec: SamplerSpec) -> dict[str, Any]:
    """As `RemoteModel.sample` takes them.

    Raises: ValueError: of guidance that takes a prompt or extras beside its numbers, which a spec hasn't.
    """
    if spec.neg_scale is not None or spec.weaker is not None:
        raise ValueError("Perp-Neg and guidance away from a weaker model are more than a spec")
    beside = ("neg_scale", "weaker")
    return {name: value for name, value in msgspec.structs.asdict(spec).items() if name not in beside}
