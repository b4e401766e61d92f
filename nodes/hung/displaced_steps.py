"""Displaced steps asked for on a MODEL, so that any sampler makes them."""

from __future__ import annotations

from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher

_KEY = "parallel_mmdit.displaced"
USUAL_WARMUP = 4


@dataclass(frozen=True)
class Displaced:
    """After `warmup_steps` exact steps; on pp ranks in `num_patches` parts of the image, 0 for one a stage.

    `by_mesh`: the MODEL's mesh asks for them; what a node asks for goes first.
    """

    warmup_steps: int
    num_patches: int = 0
    by_mesh: bool = False


def with_displaced(model: ModelPatcher, displaced: Displaced | None) -> ModelPatcher:
    """A clone of the MODEL that asks for them, or for none."""
    clone = model.clone()
    clone.set_attachments(_KEY, displaced)
    return clone


def as_mesh_asks(model: ModelPatcher, displaced: Displaced | None) -> ModelPatcher:
    """The MODEL with what its mesh asks for, in place of what another mesh did; what a node has asked for stays."""
    now = displaced_of(model)
    if now == displaced or (now is not None and not now.by_mesh):
        return model
    return with_displaced(model, displaced)


def displaced_of(model: ModelPatcher) -> Displaced | None:
    return model.get_attachment(_KEY)
