"""How a MODEL's output is read: the shift of its flow, and sampling that a node has changed."""

from __future__ import annotations

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher


def read_sampling(model: ModelPatcher, *, flow: bool) -> float | str:
    """The shift of the MODEL's flow, 1 for models that have none; or, by its name, sampling that the backend doesn't know."""
    sampling = model.get_model_object("model_sampling")
    if not flow:
        patched = model.object_patches.get("model_sampling")
        return 1.0 if patched is None else f"model sampling changed to {_kinds(patched)}"
    plain = getattr(sampling, "multiplier", None) == 1000 and getattr(sampling, "noise_scale", 1.0) == 1.0
    if not isinstance(sampling, comfy.model_sampling.CONST) or not plain:
        return f"model sampling changed to {_kinds(sampling)}"
    return float(sampling.shift)


def _kinds(sampling: object) -> str:
    return " + ".join(base.__name__ for base in type(sampling).__bases__)
