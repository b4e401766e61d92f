"""PLADIS of the pack sd-perturbed-attention: attentions to the prompt whose scores are led away from softmax.

Before the ranks are told its numbers, its own code is asked what it makes of known scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, PlaceName, SparseAttention
from .asking import check, drawn
from .kept_extras import kept_extras
from .patches import Call, Kind, Patch, closed_over, is_made_by
from .refusal import ELSEWHERE
from .unet_places import places_of

_ATTENTION = "pladis_utils:pladis_attention_wrapper.<locals>._pladis_sparse_attention"
# The pack takes the first one for names that it doesn't know.
_MAPS = ("entmax1.5", "sparsemax")
_NAME = "PLADIS"
# Patches of what goes into these attentions, whose extras don't say it.
_INTO = "attn2_patch"


def _knows(patch: Patch) -> bool:
    known = is_made_by(patch, "attn2", (_ATTENTION,), {"pladis_scale", "sparse_func"})
    return known and closed_over(patch.function)["sparse_func"] in _MAPS


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: another node's queries, keys or values go into them, or a version that is not known."""
    found = kept_extras(patches, call, (), partial(_made, patches, call))
    if found and (others := call.options.get("patches", {}).get(_INTO)):
        told = "; ".join(Patch(_INTO, None, function).told for function in others)
        raise UnsupportedError(f"A parallel MODEL can't honour {_NAME} beside {told}.", ELSEWHERE)
    return found


def _made(patches: Sequence[Patch], call: Call) -> list[SparseAttention]:
    by_setting: dict[tuple[float, str], list[PlaceName]] = {}
    for patch in patches:
        made_with = closed_over(patch.function)
        key = (float(made_with["pladis_scale"]), str(made_with["sparse_func"]))
        by_setting.setdefault(key, []).extend(places_of(patch, call))
    for function in {patch.function for patch in patches}:
        check(_NAME, function, partial(_asked, function))
    return [
        SparseAttention(places=places, scale=scale, sparse=sparse)
        for (scale, sparse), places in by_setting.items()
        if places
    ]


def _asked(function: Any) -> tuple[Tensor, Tensor]:
    """Shares that its map gives, and what they should be, told by what defines it; beside them what its sparse map makes in all, and 1.

    Sources: of `parallel_backend/extras/sparse_attention.py`.
    """
    made_with, tokens = closed_over(function), 6
    scale, power = float(made_with["pladis_scale"]), 1 if made_with["sparse_func"] == "sparsemax" else 2
    scores, one_of_each = drawn(1, 9, tokens), torch.eye(tokens)[None]
    shares = function(scores * tokens**0.5, one_of_each, one_of_each, {"n_heads": 1}).cpu()
    softmax = scores.softmax(-1)
    sparse = ((shares - (1 - scale) * softmax) / (scale or 1.0)).clamp(min=0)
    scores = scores / power
    # Of each row one threshold, which the greatest score tells: what is above it, to that power, makes 1 in all.
    threshold = scores.amax(-1, keepdim=True) - sparse.amax(-1, keepdim=True) ** (1 / power)
    expected = (scores - threshold).clamp(min=0) ** power
    total = expected.sum(-1, keepdim=True)
    ours = torch.cat(
        [scale * expected + (1 - scale) * softmax, total if scale == 0 else torch.ones_like(total)], dim=-1
    )
    return torch.cat([shares, total], dim=-1), ours


KIND = Kind(_knows, _extras)
