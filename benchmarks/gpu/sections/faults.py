"""What a user sees when a rank is killed, has no more memory, or sleeps for ever: two ranks of a real backend on one card."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch

from parallel_backend.bench.faults import Fault, Row, Stage, asleep_and, cancel, run_fault, signalled
from parallel_backend.client.backend import Backend
from parallel_backend.config import MeshSpec
from parallel_backend.errors import BackendError
from parallel_backend.rpc.conditioning import Conditioning
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit
from parallel_backend.small_checkpoints.prompts import random_prompt

from ..one_card import LOOPBACK
from ..options import Options
from ..report import NO_GPU, Report

HOOKS = Path(__file__).parents[1] / "rank_hooks"
LARGE = (8, 16, 128, 128)


def out_of_memory_on_rank_1(stage: Stage) -> None:
    """A larger image, once the rank has been told that there is no more memory; it hears it when the job comes."""
    prompt = Conditioning(*random_prompt(1, 77))
    os.kill(stage.pid(1), signal.SIGUSR2)
    stage.struck = time.monotonic()
    stage.model.sample(torch.zeros(LARGE), prompt, prompt, steps=2, should_cancel=stage._waited_long)


FAULTS = (
    Fault("rank 1 killed", signalled(1, signal.SIGKILL), "killed"),
    Fault("out of memory on rank 1", out_of_memory_on_rank_1, "out of memory"),
    Fault("rank 1 asleep before a collective, cancel", asleep_and(cancel), "cancelled"),
    # Last: it takes as long as ranks are let be silent.
    Fault("rank 1 asleep before a collective", asleep_and(lambda stage: None), "no rank has moved"),
)


def run(report: Report, options: Options) -> None:
    os.environ |= LOOPBACK
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HOOKS), os.environ.get("PYTHONPATH", "")])
    checkpoint = write_mmdit(options.scratch / "faults.safetensors", small_config("sd3.5-large"))
    report.table(
        "Faults of a backend of two ranks on one card", "fault", "seen after, s", "next picture, s", "equal", "error"
    )
    on_gpu = options.device == "cuda"
    try:
        backend = Backend(2, options.device, "faults", devices=(0, 0) if on_gpu else ())
    except BackendError as error:
        report.row("none was tried", None, None, None, _cell(f"no such backend starts here: {error}"))
        return
    try:
        stage = Stage(backend, backend.load_model(checkpoint, MeshSpec(cfg=2), "float32"), checkpoint)
        for fault in FAULTS:
            if fault.act is out_of_memory_on_rank_1 and not on_gpu:
                report.row(fault.name, NO_GPU)
            else:
                _tell(report, run_fault(stage, fault))
    finally:
        with suppress(BackendError):
            Backend.attach("faults").stop()


def _tell(report: Report, row: Row) -> None:
    report.row(row.fault, row.detected, row.recovered, str(row.equal), _cell(row.error))


def _cell(text: str) -> str:
    return " ".join(text.split())[:250].replace("|", "/")
