#!/usr/bin/env python3
"""What loading reads, and how soon a new client samples on a backend that is up.

python benchmarks/load.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from math import prod
from pathlib import Path

from interleaved import machine

from parallel_backend import Backend, MeshSpec
from parallel_backend.models.checkpoint import SafetensorsSource
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

NEW_CLIENT = """
import sys, time
import torch
from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.small_checkpoints.prompts import random_prompt
prompt = Conditioning(*random_prompt(1, 154))
start = time.perf_counter()
model = Backend.attach("benchmark").load_model(sys.argv[1], MeshSpec(tp=2), "float32")
read = sum(model.loaded.bytes_read)
model.sample(torch.zeros(1, 16, 64, 64), prompt, prompt, steps=2,
             on_step=lambda step: step.index == 0 and print(time.perf_counter() - start, read))
"""
CLIENTS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_mmdit(Path(folder) / "mmdit.safetensors", small_config("sd3.5-medium", pos_embed_size=384))
        source = SafetensorsSource(path)
        size = {name: 4 * prod(source.shape(name)) for name in source.names()}
        blocks = sum(count for name, count in size.items() if name.startswith("joint_blocks."))
        others = sum(count for name, count in size.items() if not name.startswith(("joint_blocks.", "pos_embed")))
        print(f"{machine()}\nfile: {sum(size.values()) / 2**20:.1f} MiB, of which blocks {blocks / 2**20:.1f} MiB\n")
        backend = Backend(2, "cpu", "benchmark")
        try:
            print("| mesh | MiB read by each rank | share of the blocks' bytes | second load |\n|---|---|---|---|")
            for mesh in (MeshSpec(cfg=2), MeshSpec(tp=2)):
                first = backend.load_model(path, mesh, "float32").loaded
                again = backend.load_model(path, mesh, "float32").loaded
                read = " / ".join(f"{count / 2**20:.1f}" for count in first.bytes_read)
                share = " / ".join(f"{(count - others) / blocks:.1%}" for count in first.bytes_read)
                print(f"| {mesh.describe()} | {read} | {share} | {sum(again.bytes_read)} bytes |")
            times = []
            for _ in range(CLIENTS):
                command = [sys.executable, "-c", NEW_CLIENT, str(path)]
                seconds, read = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                assert read == "0"
                times.append(float(seconds))
            print(f"\na new client, from attach to the first step: {statistics.median(times):.2f} s, 0 bytes read")
        finally:
            backend.stop()


if __name__ == "__main__":
    main()
