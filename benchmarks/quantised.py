#!/usr/bin/env python3
"""What quantised weights cost and save on a CPU: seconds to load, MiB held, seconds of a step.

python benchmarks/quantised.py --side 512 --rounds 5

SD3's layout, 12 blocks, hidden 768, random weights, computed in fp32 by one process of one thread; files as the tests write them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import interleaved, machine, ratio
from safetensors.torch import load_file, save_file

from parallel_backend import Conditioning, SamplerSpec
from parallel_backend.client.environment import KEEP_FREED_MEMORY
from parallel_backend.rank.one_process import OneProcess
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from quantised_files import write_quantised

FORMS = ("scaled fp8", "int8 by rows", "nvfp4", "Q8_0", "Q4_0", "Q4_K")
STEPS = 2


def files(folder: Path) -> dict[str, tuple[Path, str]]:
    """By name a file of half precision and quantised ones of its values, and the weights that are asked for."""
    dense = load_file(
        write_mmdit(folder / "dense.safetensors", small_config("sd3-medium", depth=12, heads=12, pos_embed_size=96))
    )
    half = folder / "half.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in dense.items()}, half)
    found = {"in half precision, held as computed": (half, ""), "in half precision, held in fp8": (half, "fp8")}
    return found | {form: (write_quantised(folder, dense, form), "") for form in FORMS}


def step(model: OneProcess, side: int) -> Callable[[], float]:
    prompts = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 154))

    def seconds() -> float:
        start = time.perf_counter()
        model.sample(torch.zeros(1, 16, side, side), *prompts, SamplerSpec(steps=STEPS, seed=1))
        return (time.perf_counter() - start) / STEPS

    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels; 512 are 1024 image tokens")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # as the ranks have it, and read only at a start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = {name: OneProcess(path, weights=weights) for name, (path, weights) in files(Path(folder)).items()}
        times = interleaved({name: step(model, args.side // 8) for name, model in models.items()}, args.rounds, "steps")
    print(f"{machine()}\n{args.side} x {args.side} pixels, guidance on; medians of {args.rounds} rounds\n")
    print("| weights | s to load | MiB held | times the first one's step |\n|---|---|---|---|")
    base = next(iter(times.values()))
    for name, model in models.items():
        held = sum(model.loaded.resident_bytes) / 2**20
        print(f"| {name} | {model.loaded.seconds:.1f} | {held:.0f} | {1 / ratio(base, times[name]):.2f} |")


if __name__ == "__main__":
    main()
