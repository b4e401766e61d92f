"""What displaced steps and step caches do to pictures: PSNR against exact ones, and what they show, of a small trained checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..client.backend import Backend
from ..config import MeshSpec, StepCache
from ..demo.scenes import CAPTIONS, Scene, held_out_scenes
from ..demo.trained import Trained
from ..demo.yardsticks import psnr, sampled_pictures, share_shown
from ..rank.one_process import OneProcess


@dataclass(frozen=True)
class Figures:
    """Of the pictures of one mesh and warm-up: dB against the exact ones, and the share that show their caption."""

    mesh: MeshSpec
    warmup: int | None
    mean_psnr: float
    least_psnr: float
    score: float


def run_pictures(
    trained: Trained, ranks: Sequence[int], warmups: Sequence[int], count: int, size: int, plot: Path | None
) -> None:
    """Prints a table, and draws it: an MMDiT in stages (PipeFusion) and rings, a UNet in bands (DistriFusion)."""
    scenes, found = held_out_scenes(count), []
    print(f"{trained.spec.steps} steps of {trained.spec.sampler}, {count} held-out captions, {size} x {size} pixels\n")
    print("| mesh | warm-up steps | PSNR against exact, mean (least), dB | captions shown |\n|---|---|---|---|")
    for world_size in ranks:
        backend = Backend(world_size, "cpu", f"pictures{world_size}")
        try:
            stages, rings, bands = MeshSpec(pp=world_size), MeshSpec(ring=world_size), MeshSpec(patch=world_size)
            for mesh in (bands,) if trained.is_unet else (stages, rings):
                found += figures(trained, backend, mesh, warmups, scenes, size)
        finally:
            backend.stop()
    if plot is not None:
        draw_plot(found, trained.spec.steps, plot)


def figures(
    trained: Trained, backend: Backend, mesh: MeshSpec, warmups: Sequence[int], scenes: Sequence[Scene], size: int
) -> list[Figures]:
    """Prints the rows of one mesh; the exact pictures come first."""
    model, vae = backend.load_model(trained.path, mesh, "float32"), backend.load_vae(trained.vae, "float32")
    net = trained.net(backend, model)

    def pictures(warmup: int | None) -> list[Tensor]:
        title = f"{model.loaded.family}, warm-up {warmup}"
        return sampled_pictures(trained, model, vae, scenes, size, title, net, leave=False, warmup_steps=warmup)

    exact, found = pictures(None), []
    for warmup in (None, *warmups):
        images = exact if warmup is None else pictures(warmup)
        distances = [psnr(a, b) for a, b in zip(images, exact, strict=True)]
        score = share_shown(images, scenes)
        found.append(Figures(mesh, warmup, sum(distances) / len(distances), min(distances), score))
        distance = "-" if warmup is None else f"{found[-1].mean_psnr:.1f} ({found[-1].least_psnr:.1f})"
        tqdm.write(f"| {mesh.describe()} | {'exact' if warmup is None else warmup} | {distance} | {score:.0%} |")
    return found


def run_step_caches(trained: Trained, values: Sequence[float], count: int, size: int) -> None:
    """Prints a table of every step cache that the model has, by threshold, or by interval: on one rank, so that seconds are of work.

    "Work": floating point operations of a sampling, of one caption, beside those of the exact one.
    """
    scenes, caches = held_out_scenes(count), step_caches(trained, values)
    work = _work([None, *caches], trained, size)
    print(f"{trained.spec.steps} steps of {trained.spec.sampler}, {count} held-out captions, {size} x {size} pixels\n")
    print(
        "| step cache | work | seconds | PSNR against exact, mean (least), dB | captions shown |\n|---|---|---|---|---|"
    )
    backend = Backend(1, "cpu", "caches")
    try:
        model, vae = backend.load_model(trained.path, MeshSpec(), "float32"), backend.load_vae(trained.vae, "float32")
        net = trained.net(backend, model)
        exact: list[Tensor] = []
        exact_seconds = 0.0
        for cache, share in zip([None, *caches], work, strict=True):
            start = time.perf_counter()
            images = sampled_pictures(trained, model, vae, scenes, size, str(cache), net, leave=False, step_cache=cache)
            seconds = time.perf_counter() - start
            exact, exact_seconds = exact or images, exact_seconds or seconds
            distances = [psnr(a, b) for a, b in zip(images, exact, strict=True)]
            named = (
                "exact"
                if cache is None
                else f"{cache.method}, {cache.interval if trained.is_unet else cache.threshold}"
            )
            distance = "-" if cache is None else f"{sum(distances) / count:.1f} ({min(distances):.1f})"
            shown = share_shown(images, scenes)
            tqdm.write(f"| {named} | {share:.2f} | {seconds / exact_seconds:.2f} | {distance} | {shown:.0%} |")
    finally:
        backend.stop()


def step_caches(trained: Trained, values: Sequence[float]) -> list[StepCache]:
    """Those that a model of this kind has, with these thresholds; of a UNet, intervals."""
    if trained.is_unet:
        return [StepCache("deepcache", interval=int(value)) for value in values]
    return [StepCache(method, threshold=value) for method in ("first_block", "teacache") for value in values]


def _work(caches: Sequence[StepCache | None], trained: Trained, size: int) -> list[float]:
    """Operations of a sampling with each, as shares of the first's."""
    process, job, found = OneProcess(trained.path), trained.job([CAPTIONS[0]], size), []
    for cache in caches:
        with FlopCounterMode(display=False) as counted:
            process.sample(*job, msgspec.structs.replace(trained.spec, step_cache=cache))
        found.append(counted.get_total_flops())
    return [operations / found[0] for operations in found]


def draw_plot(found: Sequence[Figures], steps: int, path: Path) -> None:
    """PSNR by warm-up steps, of so many, a line for each mesh. Needs matplotlib, of the extra `train`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for mesh in dict.fromkeys(f.mesh for f in found):
        own = [f for f in found if f.mesh == mesh and f.warmup is not None]
        axes.plot([f.warmup or 0 for f in own], [f.mean_psnr for f in own], marker="o", label=mesh.describe())
    axes.set(xlabel=f"warm-up steps of {steps}", ylabel="PSNR against exact, dB", title="Displaced steps")
    axes.set_xticks(sorted({f.warmup for f in found if f.warmup is not None}))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
