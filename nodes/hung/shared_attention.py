"""Self-attentions that look at another row's tokens as well: StyleAligned of style_aligned_comfy, and ReferenceOnlySimple of
ComfyUI_experiments.

Which row looks at which, a patch says itself: it is called with rows that say which they are. What is made of that is compared with
what it gives for random tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, SharedAttention
from . import token_merging
from .asked_rows import joined, marked, named, names_of
from .pack_version import pack_and_version
from .patches import Call, Kind, Patch, closed_over, origin
from .refusal import ELSEWHERE, MISFITS

_INPUT = "attn1_patch"
_REFERENCE = "reference_only:ReferenceOnlySimple.reference_only.<locals>.reference_apply"
# In the pack's first file, which is called as the user's folder is.
_ALIGNED = "SharedAttentionProcessor"
_MATCHES: dict[str, Literal["q", "k", "v"]] = {"adain_queries": "q", "adain_keys": "k", "adain_values": "v"}
_EPSILON = 1e-5
# Tokens and channels of the random ones.
_TRIED = (5, 3)


def _is_aligned(function: Any) -> bool:
    if type(function).__qualname__ != _ALIGNED or vars(function).keys() != {"args", "scale"}:
        return False
    return vars(function.args).keys() == _MATCHES.keys() and getattr(function.args, "share_attention", None) is True


def _knows(patch: Patch) -> bool:
    if patch.kind != _INPUT:
        return False
    is_reference = origin(patch.function) == _REFERENCE and closed_over(patch.function).keys() == {"batch"}
    return is_reference or _is_aligned(patch.function)


@dataclass(frozen=True)
class _Shared:
    """As `SharedAttention`, rows by their numbers."""

    sources: list[int]
    keys: list[int]
    weights: list[float]
    matched: list[Literal["q", "k", "v"]]

    def of(self, x_BLD: Tensor) -> list[Tensor]:
        """Queries, keys and values of these tokens."""
        mean, deviation = x_BLD.mean(1, keepdim=True), (x_BLD.var(1, keepdim=True) + _EPSILON).sqrt()
        changed = (x_BLD - mean) / deviation * deviation[self.sources] + mean[self.sources]
        q, k, v = (changed if name in self.matched else x_BLD for name in "qkv")
        weights = x_BLD.new_tensor(self.weights)[:, None, None]
        return [q, torch.cat([k, k[self.keys] * weights], 1), torch.cat([v, v[self.sources]], 1)]


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: beside another patch of self-attentions, or of a version or for rows that nothing here knows."""
    told = " and ".join(dict.fromkeys(pack_and_version(_class_or_function(patch)) for patch in patches))
    hung = [Patch(_INPUT, None, function) for function in call.options.get("patches", {}).get(_INPUT, ())]
    others = [patch for patch in hung if not _knows(patch) and not token_merging.KIND.knows(patch)]
    if len(patches) > 1 or others or call.options.get("patches_replace", {}).get("attn1"):
        raise UnsupportedError(
            f"A parallel MODEL can't honour shared attention ({told}) beside another patch of self-attentions.",
            ELSEWHERE,
        )
    names, shared = names_of(call, told), _asked(patches[0].function, call, told)
    yield SharedAttention(
        rows=names,
        sources=named(shared.sources, names),
        key_sources=named(shared.keys, names),
        key_weights=shared.weights,
        matched=shared.matched,
    )


def _asked(function: Any, call: Call, told: str) -> _Shared:
    rows = call.shape[0]
    marks, tokens = marked(rows, 3), _random(rows)
    plain = function
    if _is_aligned(function):
        plain = copy.copy(function)
        plain.args = copy.copy(function.args)
        vars(plain.args).update(dict.fromkeys(_MATCHES, False))
    try:
        q, k, v = plain(marks, marks, marks, {})
        given = function(tokens, tokens, tokens, {})
    except MISFITS as error:
        raise UnsupportedError(
            f"A parallel MODEL can't honour shared attention ({told}) of {rows} rows: its own code fails for them.",
            "Sample as many latents as the node was told, with a positive and a negative prompt of one length.",
            f"{type(error).__name__}: {error}",
        ) from error
    keys, values = joined(k, marks), joined(v, marks)
    if keys is not None and values is not None and torch.equal(q, marks) and all(w == 1 for _, w in values):
        matched = [name for field, name in _MATCHES.items() if getattr(getattr(function, "args", None), field, False)]
        shared = _Shared([n for n, _ in values], [n for n, _ in keys], [w for _, w in keys], matched)
        if all(map(torch.allclose, given, shared.of(tokens))):
            return shared
    raise UnsupportedError(f"A parallel MODEL can't honour shared attention of this version: {told}.", ELSEWHERE)


def _random(rows: int) -> Tensor:
    return torch.randn(rows, *_TRIED, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


def _class_or_function(patch: Patch) -> Any:
    return patch.function if hasattr(patch.function, "__qualname__") else type(patch.function)


KIND = Kind(_knows, _extras)
