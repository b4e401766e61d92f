"""Self-attention guidance, core's: it blurs where the middle block looks, which its attention's scores of uncond tell.

Its attention keeps them in a variable of its node's, where its guidance finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ...parallel_backend.rpc.extras import AnyExtra, ReportScores
from .patches import Call, Kind, Patch, in_node, is_made_by
from .unet_places import places_of

_NODE = "nodes_sag:SelfAttentionGuidance"
_PATCHES = in_node(_NODE, "attn_and_record")
_SCORES = "attn_scores"
_UNCOND = 1


def _knows(patch: Patch) -> bool:
    return is_made_by(patch, "attn1", _PATCHES, {_SCORES})


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """None for a whole sampling, in which nobody looks at the scores."""
    places = [place for patch in patches for place in places_of(patch, call)]
    if places and _UNCOND in call.branches and call.sigma is not None:
        yield ReportScores(place=places[0])


def _keep(patches: Sequence[Patch], call: Call, scores_BK: Tensor, like: Tensor) -> None:
    """What the node makes of the scores of all heads, of those of the first rows of uncond: their mean over heads, summed over queries.

    As scores of one head and one query they come to the same.
    """
    rows = scores_BK.shape[0] // len(call.branches)
    first = call.branches.index(_UNCOND) * rows
    cell = patches[0].function.__closure__[0]
    cell.cell_contents = scores_BK[first : first + rows].unsqueeze(1).to(like.device)


KIND = Kind(_knows, _extras, reported={ReportScores: _keep})
