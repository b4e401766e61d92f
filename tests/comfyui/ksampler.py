"""Runs reference.py in ComfyUI's own environment, reads what it wrote, and runs the same cases on a parallel model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel_backend import Conditioning, RemoteModel, SamplerSpec
from parallel_backend.config import ContinuousSampling, DiscreteSampling, FlowSampling, ModelSampling
from parallel_backend.sampling.parameterization import Parameterization
from parallel_backend.sampling.schedules import sigmas_for

from .core_run import run_script
from .installation import ComfyInstallation

# A case of any model family: the loop's own DifferentialDiffusion and RescaleCFG.
MASKED_BY_DEGREES = {
    "sampler": "dpmpp_2m",
    "scheduler": "simple",
    "latent": "image",
    "mask": "ramp",
    "differential": 0.8,
    "rescale_cfg": 0.7,
    "cfg": 4.5,
}


def ksampler_latents(
    comfy: ComfyInstallation, model: Path, inputs: dict[str, Tensor], cases: Mapping[str, Any], folder: Path
) -> dict[str, Tensor]:
    """KSampler's latent for each case, and `sigmas/SCHEDULER/STEPS`; a case's `file` goes before `model`, see reference.py."""
    given, results = folder / "cases.safetensors", folder / "out.safetensors"
    save_file(inputs, given, metadata={"cases": json.dumps(cases)})
    run_script(comfy, "reference.py", model, given, results, seconds=600)
    return load_file(results)


def sampled(model: RemoteModel, tensors: Mapping[str, Tensor], case: Mapping[str, Any], **prompt: Any) -> Tensor:
    """A case's latent of a parallel model. `prompt`: what its conditioning has beside context and pooled."""
    positive, negative = (
        Conditioning(tensors[case[w]], tensors[f"{case[w]}.pooled"], **prompt) for w in ("positive", "negative")
    )
    return model.sample(
        tensors[case["latent"]],
        positive,
        negative,
        seed=case["seed"],
        steps=case["steps"],
        cfg_scale=case["cfg"],
        sampler=case["sampler"],
        scheduler=case.get("scheduler", "simple"),
        denoise=case.get("denoise", 1.0),
        shift=case.get("shift", 3.0),
        model_sampling=said_by(case["sampling"]) if "sampling" in case else None,
        sigmas=torch.tensor(case["sigmas"]) if "sigmas" in case else None,
        noise=None if case.get("add_noise", True) else torch.zeros_like(tensors[case["latent"]]),
        noise_mask=tensors[case["mask"]] if "mask" in case else None,
        batch_index=case.get("batch_index"),
        rescale_cfg=case.get("rescale_cfg", 0.0),
        differential=case.get("differential"),
    )


def said_by(node: Mapping[str, Any]) -> ModelSampling:
    """What a model sampling node with these inputs says."""
    match node:
        case {"node": "ModelSamplingSD3", "shift": shift}:
            return FlowSampling(shift)
        case {"node": "ModelSamplingAuraFlow", "shift": shift}:
            return FlowSampling(shift, 1.0)
        case {"node": "ModelSamplingFlux", "max_shift": top, "base_shift": base, "width": width, "height": height}:
            mu = base + (top - base) * (width * height / 256 - 256) / (4096 - 256)
            return FlowSampling(math.exp(mu), 1.0, 10_000)
        case {"node": "ModelSamplingDiscrete", "sampling": prediction, "zsnr": zero_snr}:
            return DiscreteSampling(prediction, zero_snr)
        case {"node": "ModelSamplingContinuousEDM", "sampling": prediction, "sigma_min": low, "sigma_max": high}:
            data = 0.5 if prediction == "edm" else 1.0
            return ContinuousSampling(prediction, "log", low, high, data)
        case {"node": "ModelSamplingContinuousV", "sampling": prediction, "sigma_min": low, "sigma_max": high}:
            return ContinuousSampling(prediction, "arctan", low, high)
    raise AssertionError(f"{node} is not known to the tests")


def assert_latents_equal(latent: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(expected).all() and expected.std() > 0.01
    assert (latent - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_sigmas_equal(
    reference: Mapping[str, Tensor], scheduler: str, steps: int, model: Parameterization, rtol: float
) -> None:
    expected = reference[f"sigmas/{scheduler}/{steps}"]
    if scheduler == "kl_optimal" and steps == 1:
        assert expected.isnan().any(), "ComfyUI divides 0 by 0 here; if it no longer does, hold this case to it too"
        return
    sigmas = sigmas_for(SamplerSpec(scheduler=scheduler, steps=steps), model)
    torch.testing.assert_close(sigmas, expected, rtol=rtol, atol=1e-7)
