"""What a MODEL's own guidance evaluates beside a guider's prompts, as the backend's loop is asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.samplers
import msgspec
from torch import Tensor

from ...parallel_backend import WeakerModel
from ...parallel_backend.rpc.extras import AnyExtra
from .kinds import extras_of
from .known_functions import Known
from .patches import Call, Hung, patches_in


def processed_empty(known: Known, model: Any, noise: Tensor) -> dict[str, Any] | None:
    """The empty prompt of the node PerpNeg, which processes it by itself, as a negative one with nothing beside it."""
    if known.empty is None:
        return None
    entries = [dict(entry) for entry in known.empty[0]]
    found = comfy.samplers.encode_model_conds(model.model.extra_conds, entries, noise, model.load_device, "negative")
    return dict(found[0])


def in_further_branches(known: Known, call: Call) -> dict[str, Any]:
    """Settings of `RemoteModel.sample`: extras of evaluations that the node's functions patch, as they would.

    Args:
        call: of one prompt's rows, with the MODEL's own options.
    """
    settings: dict[str, Any] = {}
    if known.weaker is not None:
        extras = _extras(known.weaker.hung, call)
        settings["weaker"] = WeakerModel(extras, known.weaker.guidance)
    if (asked := known.in_uncond) is not None:
        extras = _extras(asked, call)
        settings["uncond_extras"] = [msgspec.structs.replace(e, start=asked.start, end=asked.end) for e in extras]
    return settings


def odd_branches(known: Known, call: Call) -> Iterator[str]:
    """Those whose patches ranks don't know, come to nothing there, or take the place of the MODEL's own."""
    of_weaker = None if known.weaker is None else known.weaker.hung
    for hung in (of_weaker, known.in_uncond):
        if hung is None:
            continue
        kinds = {patch.kind for patch in hung.patches}
        # Of one kind with those: "attn1_patch" and "attn1_output_patch" are of "attn1".
        own = [patch for patch in patches_in(call.options) if any(patch.kind.startswith(kind) for kind in kinds)]
        if own:
            yield f"evaluations with patches of {', '.join(sorted(kinds))}, beside the MODEL's own"
        elif not _extras(hung, call):
            yield "guidance away from a weaker model that nothing here makes weaker"


def _extras(hung: Hung, call: Call) -> list[AnyExtra]:
    return extras_of(replace(call, branches=(hung.branch,), options=hung.beside({})))
