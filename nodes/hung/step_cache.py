"""A step cache asked for on a MODEL, so that any sampler has it."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher

from ...parallel_backend.config import StepCache

_KEY = "parallel_mmdit.step_cache"


def with_step_cache(model: ModelPatcher, cache: StepCache) -> ModelPatcher:
    """A clone of the MODEL that asks for it."""
    clone = model.clone()
    clone.set_attachments(_KEY, cache)
    return clone


def step_cache_of(model: ModelPatcher) -> StepCache | None:
    return model.get_attachment(_KEY)  # type: ignore[no-any-return]
