"""Displaced steps asked for on a MODEL, so that any sampler makes them."""

from __future__ import annotations

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher

_KEY = "parallel_mmdit.displaced"


@dataclass(frozen=True)
class Displaced:
    """After `warmup_steps` exact steps; on pp ranks in `num_patches` parts of the image, 0 for one a stage."""

    warmup_steps: int
    num_patches: int = 0


def with_displaced(model: ModelPatcher, displaced: Displaced) -> ModelPatcher:
    """A clone of the MODEL that asks for them."""
    clone = model.clone()
    clone.set_attachments(_KEY, displaced)
    return clone


def displaced_of(model: ModelPatcher) -> Displaced | None:
    return model.get_attachment(_KEY)
