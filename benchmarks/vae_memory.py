#!/usr/bin/env python3
"""Memory that decoding takes on each rank, beyond the weights, with the number of ranks.

    python benchmarks/vae_memory.py --size 1024

The VAE: SD3's own sizes, random weights, fp32. The kernel's high-water mark of each rank's resident memory is reset
before the decode and read after it (Linux).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from interleaved import machine

from parallel_backend import Backend

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from vae_files import write_kl_vae


def memory(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    latent = torch.randn(1, 16, args.size // 8, args.size // 8)
    print(f"{machine()}\ndecode to {args.size}x{args.size} pixels, fp32\n")
    print("| ranks | MiB beyond the weights, each rank | s |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = write_kl_vae(Path(folder) / "vae.safetensors", latent_channels=16, quant=False, width=128)
        for count in args.ranks:
            backend = Backend.attach_or_start(count, "cpu", f"benchmark{count}")
            try:
                vae = backend.load_vae(path, "float32")
                vae.decode(latent[:, :, :8, :8])
                pids = [rank.pid for rank in backend.status().ranks]
                before = [memory(pid, "VmRSS") for pid in pids]
                for pid in pids:
                    Path(f"/proc/{pid}/clear_refs").write_text("5")
                start = time.perf_counter()
                vae.decode(latent)
                seconds = time.perf_counter() - start
                taken = [memory(pid, "VmHWM") - held for pid, held in zip(pids, before, strict=True)]
                print(f"| {count} | {' / '.join(f'{t / 2**20:.0f}' for t in taken)} | {seconds:.1f} |", flush=True)
            finally:
                backend.stop()


if __name__ == "__main__":
    main()
