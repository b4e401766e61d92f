"""What displaced steps cost: their distance from exact ones, by ranks and warm-up steps.

What can be told on any model, trained or not, is the error that one displaced step makes in its output, at the very input
that the exact run has there, beside the error of a control: bands that never hear of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..client.backend import Backend
from ..client.guidance import settings_of
from ..client.remote import RemoteModel, Step
from ..config import MeshSpec, SamplerSpec
from ..demo.progress import each
from ..demo.scenes import CAPTIONS
from ..demo.trained import Trained
from ..models.unet import micro_conditioning
from ..rpc.conditioning import Conditioning
from ..sampling.parameterization import Discrete
from ..sampling.schedules import sigmas_for
from ..small_checkpoints.prompts import random_sdxl_prompt


@dataclass(frozen=True)
class Run:
    """A sampling run, without guidance: what the model saw and gave at each step, and the latent at the end."""

    steps: list[tuple[Tensor, Tensor]]
    latent: Tensor


@dataclass(frozen=True)
class Subject:
    """What is measured: a UNet on a prompt, whose pooled tensor holds SDXL's sizes embedded."""

    path: Path
    prompt: Conditioning


def of_checkpoint(path: Path) -> Subject:
    """Any UNet, on random numbers of a prompt's shapes."""
    return Subject(path, Conditioning(*random_sdxl_prompt(1)))


def of_trained(trained: Trained, size: int) -> Subject:
    """A small trained UNet on a caption; an MMDiT has no sizes, and is refused when it is loaded."""
    _, prompt, _ = trained.job(CAPTIONS[:1], size)
    if prompt.sizes is not None:
        prompt = Conditioning(prompt.context, micro_conditioning(prompt.pooled, prompt.sizes))
    return Subject(trained.path, prompt)


def run_quality(subject: Subject, ranks: Sequence[int], warmups: Sequence[int], steps: int, size: int) -> None:
    """Prints a table.

    Raises: BackendError: a model that is no UNet, or a size with fewer rows than the bands need.
    """
    print(f"{steps} steps of euler, {size} x {size} pixels; errors relative to the exact run\n")
    print("| ranks | warm-up steps | output of the first displaced step | bands alone | ratio | latent at the end |")
    print("|---|---|---|---|---|---|")
    for world_size in ranks:
        backend = Backend(world_size, "cpu", f"quality{world_size}")
        try:
            print_table(backend, subject, warmups, steps, size)
        finally:
            backend.stop()


def print_table(backend: Backend, subject: Subject, warmups: Sequence[int], steps: int, size: int) -> None:
    """The rows of one number of ranks."""
    model = backend.load_model(subject.path, MeshSpec(patch=backend.world_size), "float32", kind="unet")
    exact = _run(model, subject.prompt, steps, size, None)
    for warmup in each([*warmups, steps], f"{backend.world_size} ranks", leave=False):
        displaced = _run(model, subject.prompt, steps, size, warmup)
        end = _error(displaced.latent, exact.latent)
        place = f"| {backend.world_size} | {'all' if warmup >= steps else warmup}"
        if warmup >= steps:
            tqdm.write(f"{place} | - | - | - | {end:.1e} |")
            continue
        first = max(1, warmup)
        error = _output_error(displaced, exact, first)
        seen = (exact.steps[first][0], sigmas_for(_spec(steps, None), Discrete())[first], subject.prompt)
        control = _error(_bands_alone(backend, subject.path, *seen), _output(model, *seen))
        tqdm.write(f"{place} | {error:.1e} | {control:.1e} | {control / error:.0f} | {end:.1e} |")


def _spec(steps: int, warmup: int | None) -> SamplerSpec:
    return SamplerSpec(steps=steps, cfg_scale=1.0, scheduler="normal", seed=1, warmup_steps=warmup)


def _run(model: RemoteModel, prompt: Conditioning, steps: int, size: int, warmup: int | None) -> Run:
    seen: list[tuple[Tensor, Tensor]] = []

    def on_step(step: Step) -> None:
        assert step.x is not None and step.denoised is not None
        seen.append((step.x.clone(), step.denoised.clone()))

    latent, spec = torch.zeros(1, 4, size // 8, size // 8), _spec(steps, warmup)
    latent = model.sample(latent, prompt, None, **settings_of(spec), preview="all", on_step=on_step)
    return Run(seen, latent)


def _output_error(displaced: Run, exact: Run, step: int) -> float:
    """Of what the model gave at a step whose input was still the exact one: in units of x - denoised, sigma * noise."""
    x, denoised = exact.steps[step]
    assert torch.equal(displaced.steps[step][0], x), "the steps before were not exact"
    return float((displaced.steps[step][1] - denoised).norm() / (x - denoised).norm())


def _bands_alone(backend: Backend, path: Path, x: Tensor, sigma: Tensor, prompt: Conditioning) -> Tensor:
    """Each band's output as of a picture of its own."""
    alone = backend.load_model(path, MeshSpec(dp=backend.world_size), "float32")
    bands = x.tensor_split(backend.world_size, dim=2)
    return torch.cat([_output(alone, band, sigma, prompt) for band in bands], dim=2)


def _output(model: RemoteModel, x: Tensor, sigma: Tensor, prompt: Conditioning) -> Tensor:
    schedule = Discrete()
    return model.forward(
        schedule.model_input(x, sigma), schedule.timestep(sigma).reshape(1), prompt.context, prompt.pooled
    )


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
