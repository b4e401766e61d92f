"""Timing on noisy machines: the cases take turns, round after round, and medians are compared."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
from tqdm import tqdm


def interleaved(cases: Mapping[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each case in each of `rounds` rounds, after one that isn't counted. No bar without a title."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    with tqdm(total=(rounds + 1) * len(cases), desc=title, file=sys.stderr, disable=None if title else True) as bar:
        for turn in range(rounds + 1):
            for name, case in cases.items():
                seconds = case()
                if turn:
                    times[name].append(seconds)
                bar.update(1)
    return times


def ratio(base: list[float], other: list[float]) -> float:
    """How many times faster `other` is: the median of the rounds' own ratios."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def timed_together(evaluate: Callable[[], object], repeats: int) -> float:
    """Seconds of an evaluation, on ranks that begin it at once."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        evaluate()
    return (time.perf_counter() - start) / repeats


def print_table(times: Mapping[str, list[float]], unit: str) -> None:
    """Medians, and how many times faster than the first case, which is one thread's."""
    base = next(iter(times.values()))
    article = "an" if unit[0] in "aeiou" else "a"
    print(f"| | s {article} {unit} | times faster than one thread |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio(base, seconds):.2f} |")


def machine() -> str:
    """What a figure needs beside it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{gpu}; {model or platform.machine()}; {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
