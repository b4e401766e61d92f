"""A replacement of an attention to the prompt, asked what it adds: its own code is called, with another attention for it to call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallel_backend.errors import UnsupportedError
from .asking import with_others

# As functions of packs name ComfyUI's.
_ATTENTION = "optimized_attention"
_ALWAYS = {"sigma_start": inf, "sigma_end": -inf}
# What a patch may say to it that changes nothing.
_NO_MATTER = ("attn_precision", "transformer_options")


@dataclass(frozen=True)
class Heard:
    """An attention that a patch adds: keys and values (B, T, D), and how much of it each token gets, (B, L)."""

    k: Tensor
    v: Tensor
    share: Tensor


@dataclass
class Recorder:
    """An attention that notes what it is asked for, and gives ones at call `only`, else zeros; `is_plain`: without a mask and the like.

    Raises: UnsupportedError: keys of another width than the queries, as an adapter for another model's has them.
    """

    prompt: Tensor
    only: int
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    is_plain: bool = True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, *_: Any, **more: Any) -> Tensor:
        changed = [mask, *(value for name, value in more.items() if name not in _NO_MATTER)]
        self.is_plain &= all(value is None for value in changed)
        if k is self.prompt:
            return q.new_zeros(1, 1, 1).expand(q.shape)
        if k.shape[-1] != q.shape[-1]:
            raise UnsupportedError(
                f"keys {k.shape[-1]} wide come to an attention of {q.shape[-1]}: the adapter is for another family of models.",
                "Choose an adapter for this model.",
            )
        self.calls.append((by_rows(k, q), by_rows(v, q)))
        return q.new_full((1, 1, 1), float(len(self.calls) - 1 == self.only)).expand(q.shape)


def by_rows(tensor: Tensor, q: Tensor) -> Tensor:
    """(B, T, D), as ComfyUI's attention sees it: tokens of several pictures, one after the other, are those of one row."""
    return tensor.reshape(q.shape[0], -1, q.shape[-1])


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *_: Any, **__: Any) -> Tensor:
    """Plain, in fp32."""
    split = (by_rows(x, q).float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2).to(q.dtype)


def part_of(patch: Any, chosen: int, **changed: Any) -> Any:
    """A patch like it with one of its callbacks alone, at whatever sigma; some of the callback's settings changed."""
    like = copy.copy(patch)
    like.callback, like.kwargs = [patch.callback[chosen]], [patch.kwargs[chosen] | changed | _ALWAYS]
    like.multigpu_kwargs = {}
    return like


def always(patch: Any) -> Any:
    """A patch like it that acts at whatever sigma."""
    if not hasattr(patch, "callback"):
        return patch
    like = copy.copy(patch)
    like.kwargs, like.multigpu_kwargs = [kwargs | _ALWAYS for kwargs in patch.kwargs], {}
    return like


def called(
    patch: Any, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """What the patch gives, where its code calls `attend` for ComfyUI's attention."""
    like = copy.copy(patch)
    if hasattr(patch, "callback"):
        like.callback = [with_others(callback, {_ATTENTION: attend}) for callback in patch.callback]
    out: Tensor = with_others(type(patch).__call__, {_ATTENTION: attend})(like, q, k, v, dict(options))
    return out


def heard(patch: Any, q: Tensor, options: Mapping[str, Any]) -> Sequence[Heard] | None:
    """What a patch adds to queries of that shape, whose values don't matter; None where that is no attention's output times a number.

    Raises: UnsupportedError: keys of another width; what the patch's code raises.
    """
    prompt = q[:, :1]
    found: list[Heard] = []
    while True:
        recorder = Recorder(prompt, len(found))
        out = called(patch, recorder, q, prompt, prompt, options)
        if not recorder.is_plain or (not recorder.calls and torch.count_nonzero(out)):
            return None
        if not recorder.calls:
            return []
        if out.shape != q.shape or not torch.equal(out, out[..., :1].expand(out.shape)):
            return None
        found.append(Heard(*recorder.calls[len(found)], out[..., 0]))
        if len(found) == len(recorder.calls):
            return found
