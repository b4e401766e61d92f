"""How a MODEL's output is read: the shift of its flow, and sampling that a node has changed."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.model_sampling
from comfy.model_patcher import ModelPatcher

from ...parallel_backend.errors import UnsupportedError
from .refusal import ON_KSAMPLER


def flow_shift(model: ModelPatcher) -> float:
    """The shift of the MODEL's sampling, 3 as the checkpoint says or what ModelSamplingSD3 set.

    Raises: UnsupportedError: its sampling was patched to another kind.
    """
    sampling = model.get_model_object("model_sampling")
    multiplier = getattr(sampling, "multiplier", None)
    plain = getattr(sampling, "noise_scale", 1.0) == 1.0
    if not isinstance(sampling, comfy.model_sampling.CONST) or multiplier != 1000 or not plain:
        raise UnsupportedError(
            f"The MODEL's sampling is {type(sampling).__name__}; ParallelSampler knows SD3's flow alone.", ON_KSAMPLER
        )
    return float(sampling.shift)


def sampling_patches(model: ModelPatcher) -> Iterator[str]:
    """A change of what the model's output means, of its name, where the file alone decides that."""
    patched = model.object_patches.get("model_sampling")
    if patched is not None:
        yield f"model sampling changed to {' + '.join(c.__name__ for c in type(patched).__bases__)}"
