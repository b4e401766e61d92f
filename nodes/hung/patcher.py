"""What hangs on a patcher that no evaluation brings: asked of a parallel MODEL, and of one that a pack makes around the same model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from comfy.model_patcher import ModelPatcher

from .compute import compute_patches
from .guidance import patching_functions
from .kinds import unknown_patches
from .refusal import ELSEWHERE, IN_MESH_CONFIG, refuse
from .weights import unsendable_weights


def check_patcher(patcher: ModelPatcher, found: Sequence[str] = ()) -> None:
    """Raises: UnsupportedError: names all of it, and what was `found` already."""
    refuse(compute_patches(patcher), "A parallel MODEL", IN_MESH_CONFIG)
    options = patcher.model_options.get("transformer_options", {})
    inside = chain(found, unsendable_weights(patcher), unknown_patches(options), patching_functions(patcher))
    refuse(inside, "A parallel MODEL", ELSEWHERE)
