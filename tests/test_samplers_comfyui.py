"""Every sampler and every schedule against a real ComfyUI's KSampler: same seed, same weights, same latent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui.installation import ComfyInstallation
from comfyui.ksampler import MASKED_BY_DEGREES, assert_latents_equal, assert_sigmas_equal, ksampler_latents, sampled
from torch import Tensor

from parallel_backend import Backend, MeshSpec
from parallel_backend.config import SAMPLERS, SCHEDULERS
from parallel_backend.sampling.parameterization import Flow
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

BASE = {"latent": "empty", "positive": "long", "negative": "short", "seed": 7, "steps": 5, "cfg": 4.5}
AURA = {"node": "ModelSamplingAuraFlow", "shift": 1.73}
FLUX = {"node": "ModelSamplingFlux", "max_shift": 1.15, "base_shift": 0.5, "width": 1280, "height": 768}
# euler_stochastic is the from-scratch repository's; ComfyUI has none.
COMFYUI_SAMPLERS = [name for name in SAMPLERS if name != "euler_stochastic"]
# Where the case on an image is enough: many evaluations, or what starts at sigma 1 as another of these does.
ONCE = (
    *("dpm_adaptive", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpmpp_2m_sde_heun", "sa_solver_pece"),
    *("heunpp2", "dpm_fast", "gradient_estimation", "res_multistep_ancestral", "uni_pc_bh2"),
)

CASES = {
    **{f"{s}-simple": {"sampler": s, "scheduler": "simple"} for s in COMFYUI_SAMPLERS if s not in ONCE},
    **{
        f"{s}-karras-image": {"sampler": s, "scheduler": "karras", "latent": "image", "denoise": 0.6}
        for s in COMFYUI_SAMPLERS
        if s != "dpm_adaptive"
    },
    # Of the schedule it takes the ends alone: between these it needs few evaluations.
    "dpm_adaptive": {"sampler": "dpm_adaptive", "scheduler": "sgm_uniform", "latent": "image", "denoise": 0.6},
    **{f"euler-{s}": {"sampler": "euler", "scheduler": s} for s in SCHEDULERS if s != "simple"},
    **{
        f"dpmpp_2m-{s}": {"sampler": "dpmpp_2m", "scheduler": s, "denoise": 0.45, "latent": "image"} for s in SCHEDULERS
    },
    "cfg 1": {"sampler": "euler", "scheduler": "simple", "cfg": 1.0},
    "equal prompts": {"sampler": "euler", "scheduler": "simple", "negative": "long2"},
    "shift 5": {"sampler": "dpmpp_2m", "scheduler": "sgm_uniform", "shift": 5.0},
    "mask": {"sampler": "euler_ancestral", "scheduler": "simple", "latent": "image", "mask": "mask", "denoise": 0.8},
    "mask, ddim": {"sampler": "ddim", "scheduler": "ddim_uniform", "latent": "image", "mask": "mask"},
    "mask of degrees, rescaled": MASKED_BY_DEGREES,
    "batch": {"sampler": "euler", "scheduler": "normal", "latent": "batch", "batch_index": [3, 5, 4]},
    "one draw for all": {"sampler": "euler", "scheduler": "normal", "latent": "batch", "batch_index": [4]},
    "one latent for all draws": {"sampler": "euler", "scheduler": "normal", "latent": "image", "batch_index": [1, 0]},
    "half precision": {"sampler": "euler", "scheduler": "simple", "latent": "half", "denoise": 0.7},
    "no denoise": {"sampler": "euler", "scheduler": "simple", "latent": "image", "denoise": 0.0},
    "no denoise of nothing": {"sampler": "euler", "scheduler": "simple", "latent": "batch", "sigmas": []},
    "leftover noise": {"sampler": "dpmpp_2m", "sigmas": [1.0, 0.8, 0.55, 0.3]},
    "leftover noise, mask": {"sampler": "res_multistep", "sigmas": [0.9, 0.6, 0.2], "latent": "image", "mask": "mask"},
    "rest without noise": {"sampler": "dpmpp_2m_sde", "sigmas": [0.6, 0.3, 0.0], "latent": "image", "add_noise": False},
    # Euler divides by the first sigma: much below 1e-2, the last bit of a latent comes to more than both sides may differ by.
    "back to noise": {"sampler": "euler", "sigmas": [1e-2, 0.2, 0.2, 0.6], "latent": "image", "add_noise": False},
    "one sigma": {"sampler": "euler", "sigmas": [0.4], "latent": "image"},
    "aura flow": {"sampler": "sa_solver", "scheduler": "simple", "sampling": AURA},
    "flux": {"sampler": "dpmpp_sde", "scheduler": "sgm_uniform", "sampling": FLUX},
    "one step": {"sampler": "euler", "scheduler": "simple", "steps": 1},
    "seed 0, sde": {"sampler": "dpmpp_2m_sde", "scheduler": "exponential", "seed": 0},
}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 16, 12, 20, generator=generator)
    tensors = {
        "empty": torch.zeros(1, 16, 12, 20),
        "image": image,
        "half": image.half(),
        "batch": torch.randn(3, 16, 10, 14, generator=generator),
        "mask": (torch.rand(1, 1, 96, 160, generator=generator) > 0.4).float(),
    }
    tensors["ramp"] = torch.rand(1, 1, 12, 20, generator=generator)
    for seed, (name, tokens) in enumerate({"long": 154, "short": 77, "long2": 154}.items()):
        tensors[name], tensors[f"{name}.pooled"] = random_prompt(seed, tokens)
    return tensors


@pytest.fixture(scope="module")
def smallest(models: Path) -> Path:
    """Two blocks, one of them with two attentions: enough to tell samplers and schedules apart."""
    return write_mmdit(models / "diffusion_models" / "smallest.safetensors", small_config("sd3.5-medium", depth=2))


@pytest.fixture(scope="module")
def reference(comfy: ComfyInstallation, smallest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    cases = {name: BASE | case for name, case in CASES.items()}
    return ksampler_latents(comfy, smallest, inputs(), cases, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", CASES)
def test_latent_equals_ksamplers(name: str, reference: dict[str, Tensor], backend2: Backend, smallest: Path) -> None:
    model = backend2.load_model(smallest, MeshSpec(cfg=2), "float32")
    assert_latents_equal(sampled(model, inputs(), BASE | CASES[name]), reference[name])


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sigmas_equal_comfyuis(scheduler: str, steps: int, reference: dict[str, Tensor]) -> None:
    assert_sigmas_equal(reference, scheduler, steps, Flow(), rtol=1e-6)
