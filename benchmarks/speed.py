#!/usr/bin/env python3
"""Two ranks against one process, per method: seconds of a sampling step.

    python benchmarks/speed.py --tokens 1024 --rounds 7

The model: an SD3-layout MMDiT of 12 blocks, hidden 768, random weights, fp32; guidance on, 154 text tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import interleaved, machine, ratio

from parallel_backend import Backend, Conditioning, MeshSpec, SamplerSpec
from parallel_backend.demo_checkpoints import random_prompt, small_config, write_mmdit
from parallel_backend.one_process import OneProcess
from parallel_backend.rpc.launcher import KEEP_FREED_MEMORY

MESHES = {
    "cfg=2": MeshSpec(cfg=2),
    "ulysses=2": MeshSpec(ulysses=2),
    "ring=2": MeshSpec(ring=2),
    "tp=2": MeshSpec(tp=2),
}
PROMPTS = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 154))


def alone(path: Path, side: int, steps: int, threads: int) -> Callable[[], float]:
    """A step in this process, by the same engine as the ranks run."""
    model = OneProcess(path)

    def case() -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        model.sample(torch.zeros(1, 16, side, side), *PROMPTS, SamplerSpec(steps=steps, seed=1))
        return (time.perf_counter() - start) / steps

    return case


def on_two_ranks(backend: Backend, path: Path, side: int, steps: int, mesh: MeshSpec) -> Callable[[], float]:
    model = backend.load_model(path, mesh, "float32")

    def case() -> float:
        start = time.perf_counter()
        model.sample(torch.zeros(1, 16, side, side), *PROMPTS, seed=1, steps=steps)
        return (time.perf_counter() - start) / steps

    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="image tokens, a square number")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--meshes", nargs="+", default=list(MESHES), choices=list(MESHES))
    args = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # as the ranks have it, and read only at a start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    side = 2 * round(args.tokens**0.5)
    with tempfile.TemporaryDirectory() as folder:
        config = small_config("sd3-medium", depth=12, heads=12, pos_embed_size=96)
        path = write_mmdit(Path(folder) / "mmdit.safetensors", config)
        backend = Backend.attach_or_start(2, "cpu", "benchmark")
        try:
            cases = {
                "one process, 1 thread": alone(path, side, args.steps, 1),
                "one process, 2 threads": alone(path, side, args.steps, 2),
            }
            for name in args.meshes:
                cases[f"two ranks, {name}"] = on_two_ranks(backend, path, side, args.steps, MESHES[name])
            times = interleaved(cases, args.rounds, f"{args.tokens} tokens")
        finally:
            backend.stop()
    base = times["one process, 1 thread"]
    print(f"{machine()}\n{args.tokens} image + 154 text tokens, guidance on; medians of {args.rounds} rounds\n")
    print("| | s a step | times faster than one thread |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio(base, seconds):.2f} |")


if __name__ == "__main__":
    main()
