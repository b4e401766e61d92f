"""What attentions to the prompt give for cond, guided away from what they give for another prompt.

Source: normalized attention guidance (Chen et al. 2025, arXiv 2505.21179), equations 6 to 9.
Shapes: B rows, L this rank's tokens, T tokens of the prompt, E context width, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributed.band_attention import attend_heads
from ..distributed.sites import At, Inner, Place, UNetSites
from ..errors import InputError
from ..models.extra import COND, Row
from ..rpc.extras import NormalizedPrompt
from .normalized_attention import GuidedAway, settings_of
from .target import Target, check_known


@dataclass(frozen=True, kw_only=True)
class PromptNormalizedAttention(GuidedAway):
    """Of attentions to the prompt of a UNet, before their projection out.

    The other prompt's keys and values are made anew in each evaluation, with the weights as they are then.

    Args:
        prompt: (1, T, E). guided: of the rows, whether they are cond's.
    """

    places: tuple[Place, ...]
    prompt: Tensor
    guided: tuple[bool, ...] = ()
    by_token = True

    @classmethod
    def read(
        cls, asked: NormalizedPrompt[Tensor], target: Target, range_of: dict[str, Any]
    ) -> PromptNormalizedAttention:
        """Raises: InputError: places that the model hasn't, or another model's prompt."""
        check_known(asked.places, target.places, "transformer block", target)
        shape, width = list(asked.prompt.shape), target.config.context_width
        if len(shape) != 3 or shape[0] != 1 or shape[1] < 1 or shape[2] != width:
            raise InputError(
                f"The negative prompt of normalized attention guidance has shape {shape}; this model needs (1, tokens, {width}).",
                "Encode one prompt with this model's own text encoders.",
            )
        places, prompt = tuple(asked.places), target.here(asked.prompt)
        return cls(places=places, prompt=prompt, **settings_of(asked), **range_of)

    def _chosen(self, rows: Sequence[Row]) -> PromptNormalizedAttention:
        return replace(self, guided=tuple(branch == COND for branch, _ in rows))

    def on_unet(self, sites: UNetSites) -> None:
        if any(self.guided):
            for place in self.places:
                sites.cross_attended[place].append(self._attended)

    def _attended(self, inner: Inner, q_BLD: Tensor, at: At) -> Tensor:
        assert at.to_kv is not None
        queries, rows = q_BLD.split(1), list(inner(q_BLD).split(1))
        k_1TD, v_1TD = at.to_kv(self.prompt).chunk(2, dim=-1)
        for number, guided in enumerate(self.guided):
            if guided:
                rows[number] = self.away(rows[number], attend_heads(at.kernel, at.heads, queries[number], k_1TD, v_1TD))
        return torch.cat(rows)
