#!/usr/bin/env python3
"""Memory that a decode, or a UNet's step, takes on each rank, beyond the weights, with the number of ranks.

    python benchmarks/memory.py vae --size 512
    python benchmarks/memory.py unet --size 1024 --ranks 1 2

vae: SD3's own sizes. unet: SDXL's layout, 157 million parameters, one picture without guidance. Random weights, fp32.
The kernel's high-water mark of each rank's resident memory is reset before and read after (Linux).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import machine

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.small_checkpoints.kl_vae import write_kl_vae
from parallel_backend.small_checkpoints.prompts import random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import small_unet_config, write_unet


def vae(folder: Path) -> Callable[[Backend, int], None]:
    path = write_kl_vae(folder / "vae.safetensors", latent_channels=16, quant=False, width=128)

    def decode(backend: Backend, size: int) -> None:
        backend.load_vae(path, "float32").decode(torch.randn(1, 16, size // 8, size // 8))

    return decode


def unet(folder: Path) -> Callable[[Backend, int], None]:
    path = write_unet(folder / "unet.safetensors", small_unet_config((160, 320, 640), (0, 1, 2)))

    def step(backend: Backend, size: int) -> None:
        model = backend.load_model(path, MeshSpec(patch=backend.world_size), "float32")
        model.sample(torch.zeros(1, 4, size // 8, size // 8), Conditioning(*random_sdxl_prompt(1)), None, steps=1)

    return step


SUBJECTS = {"vae": vae, "unet": unet}


def memory(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=list(SUBJECTS))
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    print(f"{machine()}\n{args.subject} at {args.size}x{args.size} pixels, fp32\n")
    print("| ranks | MiB beyond the weights, each rank | s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = SUBJECTS[args.subject](Path(folder))
        for count in args.ranks:
            backend = Backend(count, "cpu", f"benchmark{count}")
            try:
                work(backend, 64 * count)
                pids = [rank.pid for rank in backend.status().ranks]
                before = [memory(pid, "VmRSS") for pid in pids]
                for pid in pids:
                    Path(f"/proc/{pid}/clear_refs").write_text("5")
                start = time.perf_counter()
                work(backend, args.size)
                seconds = time.perf_counter() - start
                taken = [memory(pid, "VmHWM") - held for pid, held in zip(pids, before, strict=True)]
                print(f"| {count} | {' / '.join(f'{t / 2**20:.0f}' for t in taken)} | {seconds:.1f} |", flush=True)
            finally:
                backend.stop()


if __name__ == "__main__":
    main()
