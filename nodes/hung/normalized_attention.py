"""Normalized attention guidance, core's: what self-attentions give for cond, guided away from what they give for uncond."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...parallel_backend.rpc.extras import AnyExtra, NormalizedGuidance
from .patches import Call, Kind, Patch, closed_over, in_node, is_made_by

_NODE = "nodes_nag:NAGuidance"
_PATCHES = in_node(_NODE, "nag_attention_output_patch")


def _knows(patch: Patch) -> bool:
    return is_made_by(patch, "attn1_output_patch", _PATCHES, {"nag_scale", "nag_alpha", "nag_tau"})


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    if {0, 1} <= set(call.branches):
        for patch in patches:
            made_with = closed_over(patch.function)
            scale, alpha, tau = (float(made_with[f"nag_{name}"]) for name in ("scale", "alpha", "tau"))
            yield NormalizedGuidance(scale=scale, alpha=alpha, tau=tau)


KIND = Kind(_knows, _extras)
