"""Whether a patch gives what the ranks will: tried with random queries at one place, before they are told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...parallel_backend.rpc.extras import IDENTITY_TOKENS, ImagePromptForm
from .asked_patch import Heard, always, attention, called
from .cross_attentions import CrossAttention

# Of a prompt that stands in for the MODEL's.
_PROMPT_TOKENS = 3
_EXACT, _IN_HALVES = 1e-4, 3e-2


def gives_the_same(
    patch: Any,
    pictures: Sequence[tuple[ImagePromptForm, Sequence[Heard]]],
    at: CrossAttention,
    rows: int,
    options: dict[str, Any],
) -> bool:
    """Whether the patch, whatever its steps, does what `pictures` say of it, one after the other. One of them adds something."""
    k = next(one.k for _, heard in pictures for one in heard)
    generator = torch.Generator().manual_seed(0)
    counts = (at.tokens, _PROMPT_TOKENS, _PROMPT_TOKENS)
    q, *prompt = (torch.randn(rows, count, at.width, generator=generator).to(k.device, k.dtype) for count in counts)
    theirs = called(always(patch), attention, q, prompt[0], prompt[1], options).float()
    q = q.float()
    ours = attention(q, prompt[0].float(), prompt[1].float(), at.heads)
    for form, heard in pictures:
        for one in heard:
            ours = ours + _added(form, ours, q, one, at.heads)
    most = (_EXACT if k.dtype == torch.float32 else _IN_HALVES) * theirs.abs().max()
    return bool((ours - theirs).abs().max() <= most)


def _added(form: ImagePromptForm, out: Tensor, q: Tensor, one: Heard, heads: int) -> Tensor:
    """What it adds to the attention so far: see `parallel_backend/extras/image_prompt.py`, which does the same in bands."""
    found, share = attention(q, one.k.float(), one.v.float(), heads), one.share[:, :, None]
    if form == "added":
        return found * share
    kept: Tensor | float = 0.0
    if form == "partly_orthogonal":
        of_tokens = (q @ one.k.float().transpose(1, 2)).softmax(-1).mean(1, keepdim=True)
        kept = of_tokens[:, :, :IDENTITY_TOKENS].sum(-1, keepdim=True)
    along = (out * found).sum(1, keepdim=True) / (out * out).sum(1, keepdim=True) * out
    return (found - (1 - kept) * along) * share
