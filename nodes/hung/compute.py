"""How a MODEL is to be computed: in what dtype, and compiled. For ranks, Mesh Config says both."""

from __future__ import annotations

from collections.abc import Iterator

from comfy.model_patcher import ModelPatcher

# Under which ComfyUI's TorchCompileModel, and packs that call its function, leave their wrapper.
_COMPILE_KEY = "torch.compile"


def compute_patches(model: ModelPatcher) -> Iterator[str]:
    """A compute dtype that is not the ranks' own, and torch.compile of the network or its layers, by name."""
    own = model.model_dtype()
    asked = model.object_patches.get("manual_cast_dtype")
    if asked not in (None, own):
        yield f"computing in {asked} (ModelComputeDtype), where its ranks compute in {own}".replace("torch.", "")
    wrapped = any(by_key.get(_COMPILE_KEY) for by_key in model.wrappers.values())
    compiled = [key for key, patch in model.object_patches.items() if hasattr(patch, "_orig_mod")]
    if wrapped or compiled:
        yield f"torch.compile of {', '.join(compiled) or 'the network'} (TorchCompileModel)"
