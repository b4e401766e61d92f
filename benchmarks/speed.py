#!/usr/bin/env python3
"""Two ranks against one process, per method: seconds of a sampling step.

    python benchmarks/speed.py mmdit --side 512 --rounds 7
    python benchmarks/speed.py unet --side 512 --rounds 7 --steps 5
    python benchmarks/speed.py pipefusion --side 384 --rounds 3 --steps 8

The models have random weights in fp32; guidance is on. mmdit, pipefusion: SD3's layout, 12 blocks, hidden 768, 154 text
tokens. unet: SDXL's layout, 157 million parameters, 77 text tokens; its displaced case is of the steps after the warm-up.
pipefusion is of whole runs, the exact first step included: of n steps on two ranks, n / (1 + (n - 1) / 2) is all there is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from interleaved import interleaved, machine, print_table

from parallel_backend import Backend, Conditioning, MeshSpec, SamplerSpec
from parallel_backend.client.environment import KEEP_FREED_MEMORY
from parallel_backend.rank.one_process import OneProcess
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from parallel_backend.small_checkpoints.unet import small_unet_config, write_unet


@dataclass(frozen=True)
class Case:
    """What two ranks run. `whole`: the warm-up counts too."""

    mesh: MeshSpec
    warmup: int | None = None
    num_patches: int = 0
    whole: bool = True
    compile: bool = False


@dataclass(frozen=True)
class Subject:
    """A model, and how it is timed."""

    path: Path
    channels: int
    prompts: tuple[Conditioning, Conditioning]
    cases: Mapping[str, Case]


EXACT = {
    "cfg=2": Case(MeshSpec(cfg=2)),
    "ulysses=2": Case(MeshSpec(ulysses=2)),
    "ring=2": Case(MeshSpec(ring=2)),
}


def mmdit(folder: Path) -> Subject:
    return _mmdit(
        folder, EXACT | {"tp=2": Case(MeshSpec(tp=2)), "cfg=2, compiled": Case(MeshSpec(cfg=2), compile=True)}
    )


def pipefusion(folder: Path) -> Subject:
    stages = MeshSpec(pp=2)
    patches = {f"pp=2, {n} patches": Case(stages, 1, n) for n in (1, 2, 4)}
    return _mmdit(folder, EXACT | patches | {"ring=2, displaced": Case(MeshSpec(ring=2), 1)})


def _mmdit(folder: Path, cases: Mapping[str, Case]) -> Subject:
    config = small_config("sd3-medium", depth=12, heads=12, pos_embed_size=96)
    prompts = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 154))
    return Subject(write_mmdit(folder / "mmdit.safetensors", config), 16, prompts, cases)


def unet(folder: Path) -> Subject:
    config = small_unet_config((160, 320, 640), (0, 1, 2))
    prompts = Conditioning(*random_sdxl_prompt(1)), Conditioning(*random_sdxl_prompt(2))
    bands = MeshSpec(patch=2)
    cases = {
        "cfg=2": Case(MeshSpec(cfg=2)),
        "patch=2, sync": Case(bands),
        "patch=2, displaced after 1": Case(bands, 1, whole=False),
        "cfg=2, compiled": Case(MeshSpec(cfg=2), compile=True),
        "patch=2, sync, compiled": Case(bands, compile=True),
    }
    return Subject(write_unet(folder / "unet.safetensors", config), 4, prompts, cases)


SUBJECTS = {"mmdit": mmdit, "unet": unet, "pipefusion": pipefusion}


def alone(subject: Subject, side: int, steps: int, threads: int) -> Callable[[], float]:
    """A step in this process, by the same engine as the ranks run."""
    model = OneProcess(subject.path)

    def case() -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        model.sample(torch.zeros(1, subject.channels, side, side), *subject.prompts, SamplerSpec(steps=steps, seed=1))
        return (time.perf_counter() - start) / steps

    return case


def on_two_ranks(backend: Backend, subject: Subject, side: int, steps: int, case: Case) -> Callable[[], float]:
    """Seconds of a step: of the whole run, or of the steps after the warm-up, as their progress reports arrive."""
    model = backend.load_model(subject.path, case.mesh, "float32", compile=case.compile)

    def run() -> float:
        times = [time.perf_counter()]
        model.sample(
            torch.zeros(1, subject.channels, side, side),
            *subject.prompts,
            seed=1,
            steps=steps,
            warmup_steps=case.warmup,
            num_patches=case.num_patches,
            on_step=lambda step: times.append(time.perf_counter()),
        )
        if case.whole or case.warmup is None:
            return (time.perf_counter() - times[0]) / steps
        return (times[-1] - times[1 + case.warmup]) / (steps - 1 - case.warmup)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=list(SUBJECTS))
    parser.add_argument("--side", type=int, default=512, help="pixels; 512 are 1024 image tokens of an MMDiT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="3 or more where displaced steps are timed")
    args = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # as the ranks have it, and read only at a start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    side = args.side // 8
    with tempfile.TemporaryDirectory() as folder:
        subject = SUBJECTS[args.subject](Path(folder))
        if args.steps < max(2 + (case.warmup or 0) for case in subject.cases.values()):
            parser.error(f"--steps {args.steps} leaves no step after the warm-up to be timed; give 3 or more")
        backend = Backend(2, "cpu", "benchmark")
        try:
            cases = {
                "one process, 1 thread": alone(subject, side, args.steps, 1),
                "one process, 2 threads": alone(subject, side, args.steps, 2),
            }
            for name, case in subject.cases.items():
                cases[f"two ranks, {name}"] = on_two_ranks(backend, subject, side, args.steps, case)
            times = interleaved(cases, args.rounds, f"{args.subject}, {args.side} pixels")
        finally:
            backend.stop()
    print(
        f"{machine()}\n{args.subject}, {args.side} x {args.side} pixels, guidance on; medians of {args.rounds} rounds\n"
    )
    print_table(times, "step")


if __name__ == "__main__":
    main()
