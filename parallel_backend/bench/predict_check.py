"""`bench predict --check`: what is predicted of two CPU ranks beside what two CPU ranks take, method by method."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from ..client.backend import Backend
from ..config import CELL, MeshSpec
from ..rpc.conditioning import Conditioning
from ..small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from .company import QUIET, Company
from .links import Link
from .players import Play, on_cores
from .predict import UNET, measured, small_model
from .prediction_table import predicted
from .stand_in import MMDIT_TEXT, UNET_TEXT, Run

T = TypeVar("T")

MOST_OFF = 0.15
CORES = 2
MMDIT = "sd3.5-medium"


@dataclass
class Compared:
    """Seconds of a step of one method, round by round, and what share of the cores others took meanwhile."""

    name: str
    run: Run
    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    company: list[float] = field(default_factory=list)

    @property
    def quotient(self) -> float:
        """The median of the rounds' own: both sides of a round have had the same company on their cores."""
        return statistics.median(p / m for p, m in zip(self.predicted, self.measured, strict=True))

    @property
    def is_close(self) -> bool:
        return abs(self.quotient - 1) <= MOST_OFF


def methods(size: int) -> Mapping[str, list[Compared]]:
    """By layout, each method on two ranks."""

    def exact(**degrees: int) -> Run:
        return Run(MeshSpec(**degrees), size)  # type: ignore[arg-type]

    def displaced(patches: int = 0, **degrees: int) -> Run:
        return Run(MeshSpec(**degrees), size, steps=6, warmup=1, num_patches=patches)  # type: ignore[arg-type]

    mmdit = {
        "cfg=2": exact(cfg=2),
        "ulysses=2": exact(ulysses=2),
        "ring=2": exact(ring=2),
        "tp=2": exact(tp=2),
        "pp=2": exact(pp=2),
        "pp=2, 4 patches": displaced(4, pp=2),
        "ring=2, displaced": displaced(ring=2),
    }
    unet = {
        "cfg=2, UNet": exact(cfg=2),
        "patch=2": exact(patch=2),
        "patch=2, displaced": displaced(patch=2),
    }
    return {MMDIT: _compared(mmdit), UNET: _compared(unet)}


def _compared(runs: Mapping[str, Run]) -> list[Compared]:
    return [Compared(name, run) for name, run in runs.items()]


def run_check(size: int, rounds: int, patience: float = 0.0) -> bool:
    """Prints the table; whether every method is predicted within `MOST_OFF` of what it takes.

    Args:
        patience: seconds after which a round counts that others have computed beside; until then it is made again.
    """
    until = time.monotonic() + patience
    link = _in_quiet(until, (), lambda: measured("cpu"))[0]
    found: list[Compared] = []
    backend = Backend(CORES, "cpu", "predict-check")
    try:
        for layout, cases in methods(size).items():
            with small_model(layout, None, size) as path, on_cores(path, CORES) as play:
                _take_turns(backend, path, play, link, cases, rounds, until)
            backend.unload()
            found += cases
    finally:
        backend.stop()
    print(f"Two CPU ranks, {size} x {size} pixels, guidance; medians of {rounds} rounds, link measured at the start\n")
    print(
        "| | predicted, s a step | measured | predicted / measured | cores taken by others | |\n|---|---|---|---|---|---|"
    )
    for row in found:
        medians = [statistics.median(side) for side in (row.predicted, row.measured)]
        verdict = "" if row.is_close else f"more than {MOST_OFF:.0%} off"
        print(
            f"| {row.name} | {medians[0]:.3f} | {medians[1]:.3f} | {row.quotient:.2f} | {statistics.median(row.company):.0%} | {verdict} |"
        )
    return all(row.is_close for row in found)


def _in_quiet(until: float, ours: Collection[int], measure: Callable[[], T]) -> tuple[T, float]:
    """What is measured, and the share of the cores that others took meanwhile: little, unless time is over."""
    while True:
        while time.monotonic() < until and _share(ours, lambda: time.sleep(0.5))[1] > QUIET:
            pass
        found, share = _share(ours, measure)
        if share <= QUIET or time.monotonic() >= until:
            return found, share


def _share(ours: Collection[int], measure: Callable[[], T]) -> tuple[T, float]:
    company = Company(CORES, ours)
    return measure(), company.share


def _take_turns(
    backend: Backend, path: Path, play: Play, link: Link, cases: list[Compared], rounds: int, until: float
) -> None:
    """Both sides of each method in turn, round after round; the first doesn't count."""
    ours = [rank.pid for rank in backend.status().ranks]
    for turn in tqdm(range(rounds + 1), desc=path.stem, file=sys.stderr, disable=None):
        for case in cases:

            def both(run: Run = case.run) -> tuple[float, float]:
                return _measured(backend, path, run), predicted(run, play(run), link).step

            # The first one of each is there to load the models.
            (measured_step, predicted_step), share = _in_quiet(until, ours, both) if turn else _share(ours, both)
            if turn:
                case.measured.append(measured_step)
                case.predicted.append(predicted_step)
                case.company.append(share)


def _measured(backend: Backend, path: Path, run: Run) -> float:
    """Of real ranks, the same steps of the same picture: the median time between two that are done."""
    is_unet = path.stem == UNET
    model = backend.load_model(path, run.mesh, "float32")
    prompts = [random_sdxl_prompt(s, UNET_TEXT) if is_unet else random_prompt(s, MMDIT_TEXT) for s in (1, 2)]
    ends: list[float] = []
    model.sample(
        torch.zeros(1, 4 if is_unet else 16, run.size // CELL, run.size // CELL),
        *(Conditioning(*prompt) for prompt in prompts),
        seed=1,
        steps=run.steps,
        warmup_steps=run.warmup,
        num_patches=run.num_patches,
        on_step=lambda _: ends.append(time.perf_counter()),
    )
    counted = ends[run.counted - 1 :]
    return statistics.median(b - a for a, b in pairwise(counted))
