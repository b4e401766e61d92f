"""Patches of a MODEL's weights, and of its layers as objects."""

from __future__ import annotations

from collections.abc import Iterator

from comfy.model_patcher import ModelPatcher

from .attention_patches import transformer_patches


def weight_patches(model: ModelPatcher) -> Iterator[str]:
    """What hangs on the MODEL and would change its weights or its layers, each by its name."""
    if model.patches:
        yield f"a LoRA or weight patch on {len(model.patches)} weights"
    if getattr(model, "weight_wrapper_patches", None):
        yield "weight wrappers"
    if getattr(model, "injections", None):
        yield f"injections ({', '.join(model.injections)})"
    if getattr(model, "hook_patches", None):
        yield "weight hooks"
    for key in model.object_patches:
        if key.split(".")[0] in ("diffusion_model", "apply_model", "_apply_model"):
            yield f"the object patch {key!r}"
    yield from transformer_patches(model.model_options.get("transformer_options", {}))
