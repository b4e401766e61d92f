"""Token merging (ToMe), core's: the node leaves alone all attentions but those at the latent's own size, of which SDXL has none.

Which it would merge in, it says itself: its own code is asked, with queries that have no values, so that it draws no numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, PlaceName
from .patches import Call, Kind, Patch, in_node, is_made_by
from .refusal import ELSEWHERE
from .unet_places import all_places, sides_at

_NODE = "nodes_tomesd:TomePatchModel"
_HOLDS = {"tomesd_m": {"ratio", "u"}, "tomesd_u": {"u"}}
_KINDS = {"tomesd_m": "attn1_patch", "tomesd_u": "attn1_output_patch"}


def _is(patch: Patch, function: str) -> bool:
    return is_made_by(patch, _KINDS[function], in_node(_NODE, function), _HOLDS[function])


def _knows(patch: Patch) -> bool:
    return any(_is(patch, function) for function in _HOLDS)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Nothing. Raises: UnsupportedError: it would merge tokens at one of the places."""
    for patch in patches:
        if _is(patch, "tomesd_m"):
            _check(patch, call)
    return ()


def _check(patch: Patch, call: Call) -> None:
    for place in all_places(call.network):
        if _merges(patch, place, call):
            told = " ".join(map(str, place))
            raise UnsupportedError(
                f"A parallel MODEL can't honour TomePatchModel, which merges the tokens at {told} by chance.", ELSEWHERE
            )


def _merges(patch: Patch, place: PlaceName, call: Call) -> bool:
    rows, columns = sides_at(place, call)
    queries = torch.empty(1, rows * columns, 1, device="meta")
    merged, *_ = patch.function(queries, queries, queries, {"original_shape": list(call.shape)})
    return merged is not queries


KIND = Kind(_knows, _extras)
