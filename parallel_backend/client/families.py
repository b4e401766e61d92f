"""What diffusers' pipelines of a family draw with where nothing else is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..checkpoint_files.diffusion_part import diffusion_entries
from ..checkpoint_files.latent_scales import SD3_SCALE, SD3_SHIFT, SDXL_SCALE, SDXL_SHIFT
from ..checkpoint_files.sampling_marks import EDM_PLAIN, EDM_V, V_PREDICTION, ZERO_SNR
from ..errors import UnsupportedError

CONTEXT = "context_embedder.weight"


@dataclass(frozen=True)
class Family:
    """A family that `generate` draws with.

    Args:
        cell: pixels of a side that must divide a picture's.
        scale, shift: see checkpoint_files/latent_scales.py.
        steps, guidance_scale: the pipeline's own.
        scheduler: configuration of the pipeline's scheduler.
        context_width: of its text tokens.
    """

    name: Literal["SD3", "SDXL"]
    channels: int
    cell: int
    scale: float
    shift: float
    steps: int
    guidance_scale: float
    context_width: int
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def to_model(self, latent: Tensor) -> Tensor:
        """A VAE's latent as the model sees it."""
        return (latent - self.shift) * self.scale


_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
_DISCRETE = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def family_of(path: Path, name: str) -> Family:
    """Of the model that a backend has loaded from `path`, and calls so.

    Raises: UnsupportedError: `generate` doesn't draw with it.
    """
    marks = {V_PREDICTION, ZERO_SNR, *EDM_PLAIN, *EDM_V}
    entries = diffusion_entries(path, marks)
    if name.startswith("sd3") and CONTEXT in entries:
        width = entries[CONTEXT]["shape"][1]
        return Family("SD3", 16, 16, SD3_SCALE, SD3_SHIFT, 28, 7.0, width, _FLOW)
    found = marks & set(entries)
    if name != "sdxl" or found & {*EDM_PLAIN, *EDM_V}:
        what = "a model of EDM's sigmas (Playground 2.5, CosXL)" if name == "sdxl" else name
        raise UnsupportedError(
            f"generate doesn't draw with {path.name}: it is {what}, not plain SD3, SD3.5 or SDXL.",
            "Use model.sample, with conditioning of the model's own text encoders.",
        )
    scheduler = dict(_DISCRETE)
    if V_PREDICTION in found:
        scheduler["prediction_type"] = "v_prediction"
    if found >= {V_PREDICTION, ZERO_SNR}:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return Family("SDXL", 4, 8, SDXL_SCALE, SDXL_SHIFT, 50, 5.0, 2048, scheduler)
