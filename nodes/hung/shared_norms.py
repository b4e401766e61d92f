"""Norms over a row and another row together, of StyleAligned (style_aligned_comfy).

The node puts a forward of its own on the norms of the network, for good: all MODELs of that network have it from there on, in ComfyUI
as here. A layer norm is of each token alone, so that it stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor
from torch.nn import GroupNorm

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, SharedNorms
from .asked_rows import joined, marked, named, names_of
from .asking import with_others
from .layers import is_own
from .pack_version import pack_and_version
from .patches import FORWARD, Call, Kind, Patch, closed_over, origin
from .refusal import MISFITS, RELOAD

# In the pack's first file, which is called as the user's folder is.
_NORMED = ":register_norm_forward.<locals>.forward_"
_KEPT = "orig_forward"


def _is_kept_forward(attribute: str, value: Any) -> bool:
    """Whether an attribute of a layer is its own forward, which the node has put aside."""
    return attribute == _KEPT and isinstance(value, MethodType) and is_own(value.__self__, FORWARD, value)


def _knows(patch: Patch) -> bool:
    if patch.kind != FORWARD or not isinstance(patch.function, FunctionType):
        return False
    if not origin(patch.function).endswith(_NORMED):
        return False
    made_with = closed_over(patch.function)
    return made_with.keys() == {_KEPT} and _is_kept_forward(_KEPT, made_with[_KEPT])


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: of some group norms alone, or of a version or for rows that nothing here knows."""
    told = pack_and_version(patches[0].function)
    layers = dict(call.network.named_modules())
    shared = {patch.place[0] for patch in patches if patch.place} & _group_norms(layers)
    if shared and shared != _group_norms(layers):
        raise UnsupportedError(f"A parallel MODEL can't honour {told} on some of its group norms alone.", RELOAD)
    sources = _asked(patches[0].function, call.shape[0], told)
    names = names_of(call, f"shared norms ({told})")
    if shared:
        yield SharedNorms(rows=names, sources=named(sources, names))


def _group_norms(layers: dict[str, Any]) -> set[str]:
    return {name for name, layer in layers.items() if isinstance(layer, GroupNorm)}


def _asked(function: FunctionType, rows: int, told: str) -> list[int]:
    """By row, the one that is normed with it: what its own code hands to the norm."""
    marks, heard = marked(rows, 4), list[Tensor]()

    def norm(x: Tensor) -> Tensor:
        heard.append(x)
        return x

    asked = with_others(function, held={_KEPT: norm})
    try:
        out = asked(marks)
    except MISFITS as error:
        raise UnsupportedError(
            f"A parallel MODEL can't honour shared norms ({told}) of {rows} rows: the pack's own code fails for them.",
            f"Sample with a positive and a negative prompt of one length. {RELOAD}",
            f"{type(error).__name__}: {error}",
        ) from error
    found = joined(heard[0], marks) if len(heard) == 1 and out.equal(marks) else None
    if found is None or any(weight != 1 for _, weight in found):
        raise UnsupportedError(f"A parallel MODEL can't honour shared norms of this version: {told}.", RELOAD)
    return [number for number, _ in found]


KIND = Kind(_knows, _extras, left=_is_kept_forward)
