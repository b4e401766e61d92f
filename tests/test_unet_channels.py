"""UNets that take more channels than a latent has (inpainting, editing), and those that know any sigma of a range (EDM)."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unet_inputs import inputs, unet_prompt

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.config import ContinuousSampling, SamplerSpec
from parallel_backend.errors import InputError
from parallel_backend.models.unet_checkpoint import open_unet
from parallel_backend.sampling.noise import initial_noise
from parallel_backend.sampling.parameterization import Discrete
from parallel_backend.sampling.schedules import sigmas_for
from parallel_backend.small_checkpoints.unet import CONFIGS, random_unet, write_unet

WARMED: dict[str, Any] = {"steps": 3, "seed": 3, "cfg_scale": 4.0, "scheduler": "normal"}


def conditioning(seed: int) -> Conditioning:
    return Conditioning(*unet_prompt(CONFIGS["tiny"], seed))


V_EDM = {"edm_vpred.sigma_max": torch.tensor(90.0), "edm_vpred.sigma_min": torch.tensor(0.004)}
PLAYGROUND = {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}


@pytest.mark.parametrize(
    ("marks", "sampling"),
    [
        (V_EDM, ContinuousSampling("v_prediction", "log", 0.004, 90.0)),
        ({"edm_vpred.sigma_max": torch.tensor([70.0]).half()}, ContinuousSampling("v_prediction", "log", 0.002, 70.0)),
        (PLAYGROUND, ContinuousSampling("edm", "log", 0.002, 80.0, 0.5)),
        (PLAYGROUND | V_EDM | {"v_pred": torch.zeros(0)}, ContinuousSampling("edm", "log", 0.002, 80.0, 0.5)),
        ({"edm_mean": torch.zeros(4)}, None),
    ],
    ids=["CosXL", "one mark", "Playground", "all", "half of the marks"],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_marks_of_edm_are_read_with_their_values(
    marks: dict[str, Tensor], sampling: ContinuousSampling | None, prefix: str, tmp_path: Path
) -> None:
    path = write_unet(tmp_path / "m.safetensors", CONFIGS["tiny"], "single file", prefix=prefix, extra=marks)
    source, config = open_unet(path)
    assert not config.v_prediction and not any("edm" in name for name in source.names())
    if sampling is None or config.edm is None:
        assert config.edm is sampling
        return
    assert replace(config, edm=None) == CONFIGS["tiny"] and config.edm.prediction == sampling.prediction
    told = (config.edm.sigma_min, config.edm.sigma_max, config.edm.sigma_data)
    assert told == pytest.approx((sampling.sigma_min, sampling.sigma_max, sampling.sigma_data))


def test_an_edm_model_is_sampled_with_its_own_sigmas_and_scale(backend2: Backend, tmp_path: Path) -> None:
    paths = {
        name: write_unet(tmp_path / f"{name}.safetensors", CONFIGS["tiny"], "single file", extra=marks)
        for name, marks in {"plain": {}, "v": V_EDM, "playground": PLAYGROUND}.items()
    }
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = conditioning(1), conditioning(2)
    of_v = backend2.load_model(paths["v"], MeshSpec(patch=2), "float32").sample(latent, *prompts, **WARMED)
    sampling = ContinuousSampling("v_prediction", "log", float(torch.tensor(0.004)), 90.0)
    plain = backend2.load_model(paths["plain"], MeshSpec(patch=2), "float32")
    told = plain.sample(latent, *prompts, **WARMED, model_sampling=sampling)
    assert torch.equal(of_v, told)
    # A step of no denoising gives the latent back through Playground's own scales.
    model = backend2.load_model(paths["playground"], MeshSpec(patch=2), "float32")
    sigmas, none = torch.tensor([0.002]), torch.zeros_like(latent)
    same = model.sample(latent, conditioning(1), None, noise=none, sigmas=sigmas)
    assert (same - latent).abs().max() < 1e-5


# -- channels beside the latent's -----------------------------------------------------------------------------------


def beside(name: str, rows: int, seed: int, size: tuple[int, int] = (20, 12)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CONFIGS[name].extra_channels, *size, generator=generator)


def with_beside(name: str, rows: int = 1, **settings: Any) -> dict[str, Any]:
    """Three pictures, each with something of its own beside it, or all with the same; cond and uncond differ in it."""
    positive, negative = (replace(conditioning(s), concat=beside(name, rows, s)) for s in (1, 2))
    latent = torch.zeros(3, 4, 20, 12)
    return {"latent": latent, "positive": positive, "negative": negative} | WARMED | {"steps": 2} | settings


@pytest.mark.parametrize(("name", "rows"), [("inpainting", 1), ("inpainting", 4), ("editing", 2)])
def test_what_is_beside_the_latent_is_the_same_on_every_mesh(
    name: str, rows: int, backend2: Backend, backend4: Backend, unets: Path
) -> None:
    path = unets / f"unet-{name}.safetensors"
    expected = diffusers_outputs(name, rows)
    for mesh in (MeshSpec(dp=4), MeshSpec(cfg=2, patch=2), MeshSpec(dp=2, cfg=2)):
        model = backend4.load_model(path, mesh, "float32")
        ours = model.sample(**with_beside(name, rows))
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max(), mesh
    bands = backend2.load_model(path, MeshSpec(patch=2), "float32")
    exact = bands.sample(**with_beside(name, rows, warmup_steps=2))
    assert (exact - expected).abs().max() <= 1e-4 * expected.abs().max()
    displaced = bands.sample(**with_beside(name, rows, warmup_steps=1))
    assert torch.isfinite(displaced).all() and not torch.equal(displaced, exact)


def diffusers_outputs(name: str, rows: int) -> Tensor:
    """Two steps of Euler with guidance, of diffusers' UNet: what goes in is the scaled latent and what is beside it."""
    given, model = with_beside(name, rows), random_unet(CONFIGS[name])
    spec = SamplerSpec(steps=2, scheduler="normal")
    discrete = Discrete()
    sigmas = sigmas_for(spec, discrete)
    noise = initial_noise((3, 4, 20, 12), given["seed"], None)
    x = discrete.start(given["latent"], noise, sigmas[0])
    for sigma, after in pairwise(sigmas):
        outputs = []
        for branch in (given["positive"], given["negative"]):
            concat = branch.concat.repeat(3, 1, 1, 1)[:3] if rows < 3 else branch.concat[:3]
            whole = torch.cat([x / (sigma**2 + 1).sqrt(), concat], dim=1)
            context, pooled = branch.context.expand(3, -1, -1), branch.pooled.expand(3, -1)
            with torch.inference_mode():
                outputs.append(model(whole, discrete.timestep(sigma), context, class_labels=pooled).sample)
        guided = outputs[1] + given["cfg_scale"] * (outputs[0] - outputs[1])
        x = x + guided * (after - sigma)
    return x / 0.13025


def test_an_evaluation_takes_all_channels_in_one(backend4: Backend, unets: Path) -> None:
    """Also where there are fewer rows than ranks: those without rows give latents too."""
    given = inputs("inpainting", (3, 20, 12))
    expected = random_unet(CONFIGS["inpainting"])(*given[:3], class_labels=given[3]).sample
    for mesh in (MeshSpec(dp=4), MeshSpec(cfg=2, patch=2)):
        ours = backend4.load_model(unets / "unet-inpainting.safetensors", mesh, "float32").forward(*given)
        assert ours.shape == expected.shape and (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


ALONE, NINE = "takes the latent's 4 alone", "takes the latent's 4 and 5 beside them"


@pytest.mark.parametrize(
    ("name", "concat", "words", "remedy"),
    [
        ("inpainting", None, f"Nothing came beside the latent; this model {NINE}", r"of shape \(batch, 5, 20, 12\)"),
        ("inpainting", (1, 4, 20, 12), rf"\[1, 4, 20, 12\] came beside the latent; this model {NINE}", "shape"),
        ("inpainting", (1, 5, 20, 11), rf"\[1, 5, 20, 11\] came .*{NINE}", r"Give it the shape \(batch, 5, 20, 12\)"),
        ("inpainting", (0, 5, 20, 12), rf"\[0, 5, 20, 12\] came .*{NINE}", "Give it the shape"),
        ("inpainting", (5, 20, 12), rf"\[5, 20, 12\] came .*{NINE}", "Give it the shape"),
        ("editing", None, "the latent's 4 and 4 beside them", r"\(batch, 4, 20, 12\)"),
        ("tiny", (1, 4, 20, 12), rf"\[1, 4, 20, 12\] came beside the latent; this model {ALONE}", "Leave it out"),
    ],
)
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_what_is_beside_the_latent_must_fit(
    name: str,
    concat: tuple[int, ...] | None,
    words: str,
    remedy: str,
    cfg_scale: float,
    backend2: Backend,
    unets: Path,
) -> None:
    model = backend2.load_model(unets / f"unet-{name}.safetensors", MeshSpec(patch=2), "float32")
    right = None if name == "tiny" else beside(name, 1, 1)
    wrong = replace(conditioning(2), concat=None if concat is None else torch.zeros(concat))
    pair = (wrong, conditioning(1)) if cfg_scale == 1 else (replace(conditioning(1), concat=right), wrong)
    steps: list[Any] = []
    with pytest.raises(InputError, match=words) as caught:
        model.sample(torch.zeros(1, 4, 20, 12), *pair, steps=1, cfg_scale=cfg_scale, on_step=steps.append)
    assert re.search(remedy, caught.value.remedy) and not steps
    whole = replace(conditioning(1), concat=right)
    assert model.sample(torch.zeros(1, 4, 20, 12), whole, steps=1).std() > 0


@pytest.mark.parametrize(
    ("name", "channels", "words"),
    [
        ("tiny", 8, f"An input of 8 channels came; this model {ALONE}"),
        ("tiny", 3, r"this model needs \(batch, 4"),
        ("inpainting", 4, f"Nothing came beside the latent; this model {NINE}"),
        ("inpainting", 8, f"An input of 8 channels came; this model {NINE}"),
    ],
)
def test_an_evaluation_of_other_channels_is_refused(
    name: str, channels: int, words: str, backend2: Backend, unets: Path
) -> None:
    model = backend2.load_model(unets / f"unet-{name}.safetensors", MeshSpec(patch=2), "float32")
    _, *rest = inputs(name, (1, 20, 12))
    with pytest.raises(InputError, match=words) as caught:
        model.forward(torch.zeros(1, channels, 20, 12), *rest)
    assert caught.value.remedy
    for flat in (torch.zeros(1), torch.zeros(1, channels, 20)):
        with pytest.raises(InputError, match=r"this model needs \(batch, 4"):
            model.forward(flat, *rest)


def test_nan_beside_the_latent_is_told_by_its_name(backend2: Backend, unets: Path) -> None:
    model = backend2.load_model(unets / "unet-editing.safetensors", MeshSpec(patch=2), "float32")
    spoiled = beside("editing", 1, 1)
    spoiled[0, 0, 0, 0] = float("nan")
    model.sample(torch.zeros(1, 4, 20, 12), replace(conditioning(1), concat=spoiled), steps=1)
    assert model.note.startswith("The positive concat that came in holds NaN")
