"""What weights in fp8 do to pictures: PSNR against those of the file's own weights, and what they show, of a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from ..client.backend import Backend
from ..config import CAST_TO, WEIGHTS, MeshSpec
from ..demo.scenes import Scene, held_out_scenes
from ..demo.trained import Trained
from ..demo.yardsticks import psnr, sampled_pictures, share_shown

AS_IN_FILE, MESH = "float32", MeshSpec(cfg=2)
FAST = f"{CAST_TO[0]}, products too"


@dataclass(frozen=True)
class Figures:
    """Of the pictures with weights held so: MiB of a rank, dB against the file's own, and the share that show their caption."""

    weights: str
    held: float
    mean_psnr: float
    least_psnr: float
    score: float


def run_weights(trained: Trained, count: int, size: int) -> None:
    """Prints a table, computed in float32 on two ranks."""
    print(f"{trained.spec.steps} steps of {trained.spec.sampler}, {count} held-out captions, {size} x {size} pixels\n")
    print("| weights | MiB held a rank | PSNR, mean (least), dB | captions shown |\n|---|---|---|---|")
    backend = Backend(MESH.world_size, "cpu", "weights")
    try:
        rows(trained, backend, held_out_scenes(count), size)
    finally:
        backend.stop()


def rows(trained: Trained, backend: Backend, scenes: Sequence[Scene], size: int) -> list[Figures]:
    """Prints them; the file's own weights come first."""
    vae = backend.load_vae(trained.vae, "float32")
    exact: list[Tensor] = []
    found: list[Figures] = []
    for weights in (AS_IN_FILE, *WEIGHTS, FAST):
        in_fp8 = weights == FAST
        dtype = CAST_TO[0] if in_fp8 else weights
        model = backend.load_model(trained.path, MESH, dtype, fast_fp8=in_fp8, has_fp8=in_fp8)
        net = trained.net(backend, model)
        images = sampled_pictures(trained, model, vae, scenes, size, weights, net, leave=False)
        exact = exact or images
        distances = [psnr(a, b) for a, b in zip(images, exact, strict=True)]
        held = max(model.loaded.resident_bytes) / 2**20
        found.append(Figures(weights, held, sum(distances) / len(scenes), min(distances), share_shown(images, scenes)))
        last = found[-1]
        distance = "-" if images is exact else f"{last.mean_psnr:.1f} ({last.least_psnr:.1f})"
        tqdm.write(f"| {weights} | {held:.1f} | {distance} | {last.score:.0%} |")
    return found
