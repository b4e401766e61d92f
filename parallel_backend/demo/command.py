"""The main job with nothing downloaded: a small random checkpoint, two CPU ranks, one picture, seen from all sides."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..config import MeshSpec, SamplerSpec, choose
from ..demo_checkpoints import DEMO_FAMILIES, random_prompt, small_config, write_mmdit, write_taesd
from ..one_process import OneProcess
from ..rpc.client import Backend
from ..rpc.remote import Conditioning, RemoteModel, Step

BACKEND = "demo"
CFG_SCALE, SEED = 4.5, 1


def run_demo(output: str, *, steps: int, size: int, family: str) -> None:
    """Samples cold and warm on two ranks, decodes, compares with one process, and prints what it saw."""
    choose(family, DEMO_FAMILIES, "Family")
    folder = Path(output)
    print(f"1. A small {family} checkpoint with random weights (its pictures are noise) ...")
    model_path = write_mmdit(
        folder / f"{family}.safetensors", small_config(family, depth=6, heads=6, pos_embed_size=96)
    )
    vae_paths = write_taesd(folder)
    print(f"   {model_path} ({model_path.stat().st_size / 2**20:.0f} MiB)")

    print("2. A backend of two CPU ranks ...")
    with tqdm(total=None, desc="   starting", bar_format="{desc} {elapsed}", mininterval=1) as bar:
        backend = Backend.attach_or_start(2, "cpu", BACKEND, waiting=lambda seconds: bar.refresh())
    try:
        mesh = MeshSpec(cfg=2)
        model = backend.load_model(model_path, mesh, "float32")
        print(f"   {mesh.describe()}; bytes read by each rank: {model.loaded.bytes_read}")
        prompts = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 77))
        latent, seconds = _sample(model, prompts, steps, size, "3. Sampling")
        image = backend.load_vae(vae_paths, "float32").decode(latent)
        picture = folder / "demo.png"
        Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(picture)
        print(f"   {seconds:.3f} s a step; decoded in two bands: {picture}")

        again = backend.load_model(model_path, mesh, "float32")
        warm, seconds = _sample(again, prompts, steps, size, "4. The same again")
        print(
            f"   weights already resident: {sum(again.loaded.bytes_read)} bytes read; {seconds:.3f} s a step;", end=" "
        )
        print("bit-equal to the first" if torch.equal(warm, latent) else "NOT equal to the first")

        alone, seconds = _one_process(model_path, prompts, steps, size)
        difference = float((alone - latent).abs().max() / alone.abs().max())
        print(f"5. One process, one thread: {seconds:.3f} s a step; largest relative difference {difference:.1e}")
    finally:
        backend.stop()
    print("The backend was stopped. In daily use it stays up: see `parallel-mmdit serve` and `status`.")


def _sample(
    model: RemoteModel, prompts: tuple[Conditioning, Conditioning], steps: int, size: int, title: str
) -> tuple[Tensor, float]:
    """The latent, and seconds per step."""
    with tqdm(total=steps, desc=title) as bar:

        def on_step(step: Step) -> None:
            bar.update(1)

        start = time.perf_counter()
        latent = model.sample(
            torch.zeros(1, 16, size // 8, size // 8),
            *prompts,
            seed=SEED,
            steps=steps,
            cfg_scale=CFG_SCALE,
            on_step=on_step,
        )
        return latent, (time.perf_counter() - start) / steps


def _one_process(path: Path, prompts: tuple[Conditioning, Conditioning], steps: int, size: int) -> tuple[Tensor, float]:
    """The same picture by the same engine in this process, on one thread; and seconds per step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = OneProcess(path)
        spec = SamplerSpec(steps=steps, cfg_scale=CFG_SCALE, seed=SEED)
        start = time.perf_counter()
        latent = alone.sample(torch.zeros(1, 16, size // 8, size // 8), *prompts, spec)
        return latent, (time.perf_counter() - start) / steps
    finally:
        torch.set_num_threads(threads)
