"""What image tokens take from the joint attentions of an MMDiT, guided away from what they would take beside another prompt.

Source: normalized attention guidance (Chen et al. 2025, arXiv 2505.21179), equations 6 to 9, as the nodes of its authors have it.
Shapes: B rows, L text tokens, E context width, A pooled width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..distributed.sites import FurtherText, TransformerSites
from ..errors import InputError
from ..models.extra import COND, Row
from ..rpc.extras import NormalizedJointPrompt
from .normalized_attention import GuidedAway, settings_of
from .target import Target


@dataclass(frozen=True, kw_only=True)
class JointNormalizedAttention(GuidedAway):
    """Of all blocks. The other prompt's text tokens are embedded anew in each evaluation, and go through all blocks of the ranks that
    have cond's rows: a row of text more for each.

    Args:
        context: (1, L, E). pooled: (1, A). beside: the rows that are cond's.
    Comm: attention's and the pipeline's, of as many rows of text more; under tp a sum of 2 * B * L numbers for each block.
    """

    context: Tensor
    pooled: Tensor
    beside: tuple[int, ...] = ()
    has_text = True

    @classmethod
    def read(
        cls, asked: NormalizedJointPrompt[Tensor], target: Target, range_of: dict[str, Any]
    ) -> JointNormalizedAttention:
        """Raises: InputError: another model's prompt."""
        config = target.config
        shapes = list(asked.context.shape), list(asked.pooled.shape)
        if len(shapes[0]) != 3 or shapes != ([1, shapes[0][1], config.context_width], [1, config.pooled_width]):
            raise InputError(
                f"The negative prompt of normalized attention guidance has shapes {shapes[0]} and {shapes[1]}; this model needs "
                f"(1, tokens, {config.context_width}) and (1, {config.pooled_width}).",
                "Encode one prompt with this model's own text encoders.",
            )
        context, pooled = target.here(asked.context), target.here(asked.pooled)
        return cls(context=context, pooled=pooled, **settings_of(asked), **range_of)

    def check_tokens(self, tokens: int) -> None:
        if (own := self.context.shape[1]) != tokens:
            raise InputError(
                f"The negative prompt of normalized attention guidance has {own} tokens, and the prompt {tokens}.",
                "Repeat the shorter one's tokens until both have as many.",
            )

    def _chosen(self, rows: Sequence[Row]) -> JointNormalizedAttention:
        return replace(self, beside=tuple(number for number, (branch, _) in enumerate(rows) if branch == COND))

    def on_transformer(self, sites: TransformerSites) -> None:
        if count := len(self.beside):
            context, pooled = self.context.expand(count, -1, -1), self.pooled.expand(count, -1)
            sites.further = FurtherText(context, pooled, self.beside, self.away)
