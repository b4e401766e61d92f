"""How a MODEL's output is read: its sampling, as ComfyUI made it or a node changed it, by plain parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_sampling as core
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import LCM, ModelSamplingDiscreteDistilled

from ...parallel_backend.config import ContinuousSampling, DiscreteSampling, FlowSampling, ModelSampling

_DISCRETE = {core.EPS: "eps", core.V_PREDICTION: "v_prediction", core.X0: "x0", core.IMG_TO_IMG: "img_to_img"}
_CONTINUOUS = {core.EPS: "eps", core.V_PREDICTION: "v_prediction", core.EDM: "edm"}
# Stable Diffusion's: of the timesteps that the backend has, and of those that a distilled model knows.
_BETAS = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000, "sigma_data": 1.0}
_DISTILLED = {"original_timesteps": 50, "skip_steps": 20}


def read_sampling(model: ModelPatcher) -> ModelSampling | str:
    """The MODEL's sampling as the backend knows it; or by its name, where it doesn't."""
    sampling = model.get_model_object("model_sampling")
    bases = type(sampling).__bases__
    reader = _readers().get(bases[0])
    known = reader(sampling, bases[1]) if reader is not None and len(bases) == 2 else None
    if known is None:
        return f"model sampling changed to {' + '.join(base.__name__ for base in bases)}"
    return known


def _readers() -> dict[type, Callable[[Any, type], ModelSampling | None]]:
    """By the class of the schedule; each is given the sampling, and the class of what the output means."""
    return {
        core.ModelSamplingDiscreteFlow: _flow,
        core.ModelSamplingFlux: _flux,
        core.ModelSamplingDiscrete: _discrete,
        ModelSamplingDiscreteDistilled: _distilled,
        core.ModelSamplingContinuousEDM: _continuous,
        core.ModelSamplingContinuousV: _continuous,
    }


def _flow(sampling: Any, output: type) -> FlowSampling | None:
    if output is not core.CONST or getattr(sampling, "noise_scale", 1.0) != 1.0:
        return None
    return FlowSampling(float(sampling.shift), float(sampling.multiplier), len(sampling.sigmas))


def _flux(sampling: Any, output: type) -> FlowSampling | None:
    """Its shift is the logarithm of the others'."""
    return FlowSampling(math.exp(sampling.shift), 1.0, len(sampling.sigmas)) if output is core.CONST else None


def _discrete(sampling: Any, output: type) -> DiscreteSampling | None:
    if output not in _DISCRETE or not _has(sampling, _BETAS):
        return None
    return DiscreteSampling(_DISCRETE[output], bool(sampling.zsnr))


def _distilled(sampling: Any, output: type) -> DiscreteSampling | None:
    if output is not LCM or not _has(sampling, _BETAS | _DISTILLED):
        return None
    return DiscreteSampling("lcm", bool(sampling.zsnr))


def _continuous(sampling: Any, output: type) -> ContinuousSampling | None:
    if output not in _CONTINUOUS:
        return None
    times = "arctan" if isinstance(sampling, core.ModelSamplingContinuousV) else "log"
    range_ = (float(sampling.sigma_min), float(sampling.sigma_max))
    return ContinuousSampling(_CONTINUOUS[output], times, *range_, float(sampling.sigma_data))  # type: ignore[arg-type]


def _has(sampling: Any, settings: dict[str, float]) -> bool:
    return all(getattr(sampling, name, value) == value for name, value in settings.items())
