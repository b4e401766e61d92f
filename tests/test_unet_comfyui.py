"""SDXL against a real ComfyUI: its KSampler on the same file, and the nodes over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.installation import ComfyInstallation
from comfyui.ksampler import MASKED_BY_DEGREES, assert_latents_equal, assert_sigmas_equal, ksampler_latents, sampled
from comfyui.prompts import Prompt, conditioning, mesh, out, sampler, save_latent
from comfyui.server import ComfyServer
from test_comfyui_nodes import latent_of
from torch import Tensor

from parallel_backend import Backend, MeshSpec, SamplerSpec
from parallel_backend.config import SAMPLERS, SCHEDULERS
from parallel_backend.sampling.parameterization import Discrete
from parallel_backend.sampling.schedules import sigmas_for
from parallel_backend.small_checkpoints.unet import CONFIGS, write_unet
from parallel_training.unet import CONFIG

NAME = "sdxl-koala.safetensors"
BASE = {"latent": "empty", "positive": "long", "negative": "short", "seed": 7, "steps": 3, "cfg": 1.0}
SIZES = {"width": 832, "height": 1216, "crop_w": 8, "crop_h": 16, "target_width": 768, "target_height": 1152}
DISCRETE, EDM = "ModelSamplingDiscrete", "ModelSamplingContinuousEDM"
SAMPLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero SNR": ("sa_solver", {"node": DISCRETE, "sampling": "v_prediction", "zsnr": True}),
    "LCM": ("lcm", {"node": DISCRETE, "sampling": "lcm", "zsnr": False}),
    "x0": ("euler", {"node": DISCRETE, "sampling": "x0", "zsnr": False}),
    "image to image": ("euler", {"node": DISCRETE, "sampling": "img_to_img", "zsnr": False}),
    "EDM": ("dpmpp_2m", {"node": EDM, "sampling": "edm", "sigma_min": 0.002, "sigma_max": 80.0}),
    "continuous noise": ("heunpp2", {"node": EDM, "sampling": "eps", "sigma_min": 0.01, "sigma_max": 20.0}),
    "arc tangent": (
        "euler_ancestral",
        {"node": "ModelSamplingContinuousV", "sampling": "v_prediction", "sigma_min": 0.03, "sigma_max": 500.0},
    ),
    "a flow": ("er_sde", {"node": "ModelSamplingSD3", "shift": 2.0}),
}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{s}-normal": {"sampler": s, "scheduler": "normal"}
        for s in SAMPLERS
        if s not in ("euler_stochastic", "dpm_adaptive")
    },
    # Of the schedule it takes the ends alone: between these it needs few evaluations.
    "dpm_adaptive": {"sampler": "dpm_adaptive", "scheduler": "sgm_uniform", "latent": "image", "denoise": 0.6},
    **{f"euler-{s}": {"sampler": "euler", "scheduler": s} for s in SCHEDULERS if s != "normal"},
    "guidance": {"sampler": "dpmpp_2m", "scheduler": "karras", "cfg": 4.5},
    "image": {"sampler": "dpmpp_2m_sde", "scheduler": "karras", "latent": "image", "denoise": 0.6},
    "mask": {"sampler": "euler_ancestral", "scheduler": "simple", "latent": "image", "mask": "mask", "denoise": 0.8},
    "mask of degrees, rescaled": MASKED_BY_DEGREES,
    "batch": {"sampler": "euler", "scheduler": "normal", "latent": "batch", "batch_index": [3, 5]},
    "sizes": {"sampler": "euler", "scheduler": "normal", "options": SIZES, "cfg": 3.0},
    **{
        f"{name} with {sampler}": {"sampler": sampler, "scheduler": "sgm_uniform", "sampling": node, "latent": "image"}
        for name, (sampler, node) in SAMPLINGS.items()
    },
    "continuous, denoised less": {
        "sampler": "dpm_2",
        "scheduler": "normal",
        "sampling": SAMPLINGS["arc tangent"][1],
        "latent": "image",
        "denoise": 0.5,
    },
    "odd size": {"sampler": "dpmpp_2m", "scheduler": "karras", "latent": "odd"},
}

V_CASE = BASE | CASES["euler-normal"]


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "empty": torch.zeros(1, 4, 8, 8),
        "image": torch.randn(1, 4, 8, 8, generator=generator),
        "batch": torch.randn(2, 4, 8, 12, generator=generator),
        "odd": torch.randn(1, 4, 13, 9, generator=generator),
        "mask": (torch.rand(1, 1, 64, 64, generator=generator) > 0.4).float(),
    }
    tensors["ramp"] = torch.rand(1, 1, 8, 8, generator=generator)
    for name, tokens in {"long": 154, "short": 77}.items():
        tensors[name] = torch.randn(1, tokens, 2048, generator=generator)
        tensors[f"{name}.pooled"] = torch.randn(1, 1280, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def koala(models: Path) -> Path:
    return write_unet(models / "diffusion_models" / NAME, CONFIGS["koala"], "single file")


@pytest.fixture(scope="module")
def tiny(unets: Path) -> Path:
    """The smallest that tells samplers and schedules apart; ComfyUI's own loaders have no name for it."""
    return unets / "unet-tiny.safetensors"


@pytest.fixture(scope="module")
def v_prediction(models: Path) -> Path:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    return write_unet(models / "diffusion_models" / f"v-{NAME}", CONFIGS["koala"], "single file", extra=marks)


@pytest.fixture(scope="module")
def narrow(models: Path) -> Path:
    """As `parallel-mmdit train unet` writes them: SDXL's layout at widths that ComfyUI has no detection for."""
    return write_unet(models / "diffusion_models" / "narrow.safetensors", CONFIG)


@pytest.fixture(scope="module")
def reference(
    comfy: ComfyInstallation,
    begun_server: ComfyServer,
    tiny: Path,
    v_prediction: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Tensor]:
    cases = {name: BASE | case for name, case in CASES.items()} | {"v": V_CASE | {"file": str(v_prediction)}}
    return ksampler_latents(comfy, tiny, inputs(), cases, tmp_path_factory.mktemp("reference"))


def picture_of(backend: Backend, path: Path, case: dict[str, Any], mesh: MeshSpec) -> Tensor:
    tensors = inputs()
    height, width = (8 * side for side in tensors[case["latent"]].shape[2:])
    sizes = {"height": height, "width": width, "crop_h": 0, "crop_w": 0} | case.get("options", {})
    sizes = {"target_height": sizes["height"], "target_width": sizes["width"]} | sizes
    ordered = [sizes[k] for k in ("height", "width", "crop_h", "crop_w", "target_height", "target_width")]
    return sampled(backend.load_model(path, mesh, "float32"), tensors, case, sizes=ordered)


@pytest.mark.parametrize("name", CASES)
def test_latent_equals_ksamplers(name: str, reference: dict[str, Tensor], backend2: Backend, tiny: Path) -> None:
    assert_latents_equal(picture_of(backend2, tiny, BASE | CASES[name], MeshSpec(patch=2)), reference[name])


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sigmas_equal_comfyuis(scheduler: str, steps: int, reference: dict[str, Tensor]) -> None:
    assert_sigmas_equal(reference, scheduler, steps, Discrete(), rtol=2e-6)


def test_v_prediction_and_zero_snr_are_read_from_the_file(
    reference: dict[str, Tensor], v_prediction: Path, backend2: Backend
) -> None:
    assert_latents_equal(picture_of(backend2, v_prediction, V_CASE, MeshSpec(cfg=2)), reference["v"])
    sigmas = sigmas_for(SamplerSpec(scheduler="normal", steps=20), Discrete("v_prediction", zero_snr=True))
    expected = reference[f"{v_prediction.name}/sigmas/normal/20"]
    torch.testing.assert_close(sigmas, expected, rtol=1e-4, atol=1e-7)


# -- nodes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor(server: ComfyServer, comfy_backend: str, koala: Path, narrow: Path) -> ComfyServer:
    """A ComfyUI with these files and a backend."""
    return server


def picture(prompt: Prompt, node: str, model: list[Any], **settings: Any) -> str:
    positive, negative = (conditioning(prompt, s, width=2048, pooled=1280) for s in (1, 2))
    empty = out(prompt.add("EmptyLatentImage", width=128, height=104, batch_size=1))
    latent = sampler(prompt, node, model, positive, negative, empty, scheduler="normal", **settings)
    return save_latent(prompt, latent, node)


def unet(prompt: Prompt, name: str = NAME, **degrees: Any) -> list[Any]:
    return out(prompt.add("LoadParallelUNet", model_name=name, mesh=mesh(prompt, **degrees)))


def test_both_samplers_give_a_local_models_latent(editor: ComfyServer) -> None:
    prompt = Prompt()
    local = out(prompt.add("UNETLoader", unet_name=NAME, weight_dtype="default"))
    saved = picture(prompt, "KSampler", local)
    expected = latent_of(editor, editor.run(prompt.nodes), saved)
    for node in ("KSampler", "ParallelSampler"):
        for degrees in ({}, {"cfg": 1}):
            prompt = Prompt()
            saved = picture(prompt, node, unet(prompt, **degrees))
            latent = latent_of(editor, editor.run(prompt.nodes), saved)
            assert (latent - expected).abs().max() <= 1e-4 * expected.abs().max(), (node, degrees)


def test_a_narrow_unet_is_a_model_for_both_samplers(editor: ComfyServer, narrow: Path) -> None:
    latents = []
    for node in ("KSampler", "ParallelSampler"):
        prompt = Prompt()
        saved = picture(prompt, node, unet(prompt, narrow.name, cfg=1))
        latents.append(latent_of(editor, editor.run(prompt.nodes), saved))
    stock, whole = latents
    assert stock.std() > 0.1 and (stock - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_displaced_steps_are_a_widget_and_their_price_is_shown(editor: ComfyServer) -> None:
    prompt = Prompt()
    model = unet(prompt, cfg=1)
    saved = picture(prompt, "ParallelSampler", model, steps=6, displaced=True, warmup_steps=2)
    outcome = editor.run(prompt.nodes)
    displaced = latent_of(editor, outcome, saved)
    texts = [text for shown in outcome.texts.values() for text in shown]
    assert any("waiting for others; sent a step: patch" in text for text in texts), texts
    prompt = Prompt()
    saved = picture(prompt, "ParallelSampler", unet(prompt, cfg=1), steps=6)
    exact = latent_of(editor, editor.run(prompt.nodes), saved)
    difference = (displaced - exact).abs().max() / exact.abs().max()
    assert 1e-4 < difference < 0.5


@pytest.mark.parametrize(
    ("loader", "name", "words"),
    [
        ("LoadParallelMMDiT", NAME, "is a UNet"),
        ("LoadParallelUNet", "sd3.5-medium.safetensors", "holds no UNet"),
    ],
)
def test_a_loader_refuses_the_other_kind(loader: str, name: str, words: str, editor: ComfyServer) -> None:
    prompt = Prompt()
    model = out(prompt.add(loader, model_name=name, mesh=mesh(prompt)))
    picture(prompt, "ParallelSampler", model)
    outcome = editor.run(prompt.nodes)
    assert words in str(outcome.error)
