"""What displaced steps cost: their distance from exact ones, by ranks and warm-up steps.

On random weights a picture says nothing, and neighbouring steps differ more than a trained model's. What can be told is
the error that one displaced step makes in the model's output, at the very input that the exact run has there, beside
the error of a control: bands that never hear of each other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import MeshSpec
from ..demo_checkpoints import random_sdxl_prompt, small_unet_config, write_unet
from ..rpc.client import Backend
from ..rpc.remote import Conditioning, RemoteModel, Step


@dataclass(frozen=True)
class Run:
    """A sampling run, without guidance: what the model saw and gave at each step, and the latent at the end."""

    steps: list[tuple[Tensor, Tensor]]
    latent: Tensor


def run_quality(ranks: Sequence[int], warmups: Sequence[int], steps: int, size: int, path: Path | None) -> None:
    """Prints a table. Without a `path`, of a small UNet with random weights.

    Raises: BackendError: a model that is no UNet, or a size with fewer rows than the bands need.
    """
    print(f"{steps} steps of euler, {size} x {size} pixels; errors relative to the exact run\n")
    print("| ranks | warm-up steps | output of the first displaced step | bands alone | ratio | latent at the end |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = path or write_unet(Path(folder) / "unet.safetensors", small_unet_config())
        for world_size in ranks:
            backend = Backend.attach_or_start(world_size, "cpu", f"quality{world_size}")
            try:
                print_table(backend, path, warmups, steps, size)
            finally:
                backend.stop()


def print_table(backend: Backend, path: Path, warmups: Sequence[int], steps: int, size: int) -> None:
    """The rows of one number of ranks."""
    model = backend.load_model(path, MeshSpec(patch=backend.world_size), "float32", kind="unet")
    exact = _run(model, steps, size, None)
    for warmup in tqdm([*warmups, steps], desc=f"{backend.world_size} ranks", leave=False):
        displaced = _run(model, steps, size, warmup)
        end = _error(displaced.latent, exact.latent)
        place = f"| {backend.world_size} | {'all' if warmup >= steps else warmup}"
        if warmup >= steps:
            tqdm.write(f"{place} | - | - | - | {end:.1e} |")
            continue
        first = max(1, warmup)
        error = _output_error(displaced, exact, first)
        control = _error(_bands_alone(backend, path, exact, first), _bands_together(model, exact, first))
        tqdm.write(f"{place} | {error:.1e} | {control:.1e} | {control / error:.0f} | {end:.1e} |")


def _run(model: RemoteModel, steps: int, size: int, warmup: int | None) -> Run:
    seen: list[tuple[Tensor, Tensor]] = []

    def on_step(step: Step) -> None:
        assert step.x is not None and step.denoised is not None
        seen.append((step.x.clone(), step.denoised.clone()))

    latent = model.sample(
        torch.zeros(1, 4, size // 8, size // 8),
        _prompt(),
        None,
        seed=1,
        steps=steps,
        cfg_scale=1.0,
        scheduler="normal",
        warmup_steps=warmup,
        preview=True,
        on_step=on_step,
    )
    return Run(seen, latent)


def _prompt() -> Conditioning:
    return Conditioning(*random_sdxl_prompt(1))


def _output_error(displaced: Run, exact: Run, step: int) -> float:
    """Of what the model gave at a step whose input was still the exact one: in units of x - denoised, sigma * noise."""
    x, denoised = exact.steps[step]
    assert torch.equal(displaced.steps[step][0], x), "the steps before were not exact"
    return float((displaced.steps[step][1] - denoised).norm() / (x - denoised).norm())


def _bands_together(model: RemoteModel, exact: Run, step: int) -> Tensor:
    return model.forward(_model_input(exact, step), torch.tensor([500.0]), *_tensors())


def _bands_alone(backend: Backend, path: Path, exact: Run, step: int) -> Tensor:
    """Each band's output as of a picture of its own."""
    alone = backend.load_model(path, MeshSpec(dp=backend.world_size), "float32")
    x = _model_input(exact, step)
    bands = x.tensor_split(backend.world_size, dim=2)
    return torch.cat([alone.forward(band, torch.tensor([500.0]), *_tensors()) for band in bands], dim=2)


def _model_input(exact: Run, step: int) -> Tensor:
    """The step's x at unit variance, as the model sees it."""
    x = exact.steps[step][0]
    return x / x.std()


def _tensors() -> tuple[Tensor, Tensor]:
    return _prompt().context, _prompt().pooled


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
