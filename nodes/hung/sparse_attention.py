"""PLADIS of the pack sd-perturbed-attention: attentions to the prompt whose scores are led away from softmax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, PlaceName, SparseAttention
from .known_functions import closed_over
from .patches import Call, Kind, Patch, is_made_by
from .refusal import ELSEWHERE
from .unet_places import places_of

_ATTENTION = "pladis_utils:pladis_attention_wrapper.<locals>._pladis_sparse_attention"
# The pack takes the first one for names that it doesn't know.
_MAPS = ("entmax1.5", "sparsemax")
# Patches of what goes into these attentions, whose extras don't say it.
_INTO = "attn2_patch"


def _knows(patch: Patch) -> bool:
    known = is_made_by(patch, "attn2", (_ATTENTION,), {"pladis_scale", "sparse_func"})
    return known and closed_over(patch.function)["sparse_func"] in _MAPS


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: another node's queries, keys or values go into them."""
    by_setting: dict[tuple[float, str], list[PlaceName]] = {}
    for patch in patches:
        made_with = closed_over(patch.function)
        key = (float(made_with["pladis_scale"]), str(made_with["sparse_func"]))
        by_setting.setdefault(key, []).extend(places_of(patch, call))
    found = [
        SparseAttention(places=places, scale=scale, sparse=sparse)
        for (scale, sparse), places in by_setting.items()
        if places
    ]
    if found and (others := call.options.get("patches", {}).get(_INTO)):
        told = "; ".join(Patch(_INTO, None, function).told for function in others)
        raise UnsupportedError(f"A parallel MODEL can't honour PLADIS beside {told}.", ELSEWHERE)
    return found


KIND = Kind(_knows, _extras)
