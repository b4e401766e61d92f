"""The sigmas of a picture: those of diffusers' scheduler, made by its own class, or of ComfyUI's schedule by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import DiscreteSampling, FlowSampling, ModelSampling, SamplerSpec
from ..errors import UnsupportedError, in_a_line
from ..sampling.parameterization import Parameterization, parameterization_of
from ..sampling.schedules import sigmas_for

_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction"}
_BY_NAME = "Name one of ComfyUI's: generate(..., sampler='euler', scheduler='normal')."
# As near as a table of fp32 sigmas tells timesteps.
_TIMESTEP_TOLERANCE = 0.01


@dataclass(frozen=True)
class Schedule:
    """Where a picture's steps stand, on the CPU, fp32.

    Args:
        sigmas: one more than steps.
        timesteps: what the model is told at each step.
        start: what noise of variance 1 is multiplied with to become the first x.
        noise_factor: what it is multiplied with beforehand, so that a sampling makes that of it.
        model_sampling: what the model's output means.
    """

    sigmas: Tensor
    timesteps: Tensor
    start: float
    noise_factor: float
    model_sampling: ModelSampling


def comfyui_schedule(config: Mapping[str, Any], sampler: str, scheduler: str, steps: int) -> Schedule:
    """KSampler's, of a model whose pipeline has that scheduler's configuration. Raises: ConfigError: a name is not known."""
    meaning = _meaning(config)
    model = parameterization_of(meaning)
    sigmas = sigmas_for(SamplerSpec(sampler, scheduler, steps), model)
    timesteps = torch.stack([model.timestep(sigma) for sigma in sigmas[:-1]])
    return Schedule(sigmas, timesteps, _start(model, sigmas[0]), 1.0, meaning)


def diffusers_schedule(config: Mapping[str, Any], steps: int) -> Schedule:
    """What the pipeline's own scheduler makes of that many steps.

    Raises: UnsupportedError: it goes otherwise from sigma to sigma than by Euler's steps, or tells the model other timesteps
        than the ranks would.
    """
    import diffusers

    meaning, name = _meaning(config), config["_class_name"]
    if name not in ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"):
        raise UnsupportedError(f"The pipeline's {name} is none that ranks draw with.", _BY_NAME)
    scheduler = getattr(diffusers, name).from_config(dict(config))
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError, ImportError) as error:  # of settings that ask for more: dynamic shifts, beta sigmas
        raise UnsupportedError(f"The pipeline's {name} can't be used: {in_a_line(error)}.", _BY_NAME) from None
    sigmas, timesteps = scheduler.sigmas.float().cpu(), scheduler.timesteps.float().cpu()
    model = parameterization_of(meaning)
    told = torch.stack([model.timestep(sigma) for sigma in sigmas[:-1]])
    if told.shape != timesteps.shape or bool(((told - timesteps).abs() > _TIMESTEP_TOLERANCE).any()):
        raise UnsupportedError(
            f"The pipeline's {name} tells the model timesteps between those of its training, and ranks don't.", _BY_NAME
        )
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return Schedule(sigmas, timesteps, start, start / _start(model, sigmas[0]), meaning)


def _meaning(config: Mapping[str, Any]) -> ModelSampling:
    """Raises: UnsupportedError: a prediction that ranks don't know."""
    if "Flow" in config.get("_class_name", ""):
        return FlowSampling(shift=float(config.get("shift", 1.0)))
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise UnsupportedError(f"The pipeline's scheduler has prediction_type {prediction!r}.", "Use model.sample.")
    return DiscreteSampling(_PREDICTIONS[prediction], zero_snr=bool(config.get("rescale_betas_zero_snr", False)))


def _start(model: Parameterization, sigma: Tensor) -> float:
    """What noise is multiplied with where nothing lies under it."""
    return float(model.start(torch.zeros(1), torch.ones(1), sigma))
