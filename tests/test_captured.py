"""Evaluations done by recordings are those that run as ever, bit for bit: over steps, prompts and jobs, on every kind of mesh."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_network import local_network
from rank_pool import RankPool, groups
from recordings import Recorder
from test_from_scratch import write_pickle
from torch import Tensor
from unet_inputs import unet_prompt

from parallel_backend import MeshSpec
from parallel_backend.distributed import stale
from parallel_backend.distributed.mesh import build_mesh
from parallel_backend.distributed.stale import Step
from parallel_backend.models import captured
from parallel_backend.models.captured import CapturedNetwork
from parallel_backend.models.families import FROM_SCRATCH, SD3, SDXL
from parallel_backend.models.prediction import Predictor
from parallel_backend.models.residuals import Residuals
from parallel_backend.models.rows import Prompt, Rows
from parallel_backend.small_checkpoints.prompts import random_prompt
from parallel_backend.small_checkpoints.unet import CONFIGS

pytestmark = pytest.mark.busy

KINDS = {"mmdit": SD3, "unet": SDXL, "from scratch": FROM_SCRATCH}
STEPS = 5


@dataclass(frozen=True)
class Job:
    """Args: size: rows, height, width. tokens: of each prompt. warmup: exact steps; None is an exact job."""

    size: tuple[int, int, int] = (1, 16, 12)
    tokens: tuple[int, ...] = (7, 12)
    seed: int = 0
    warmup: int | None = None
    steps: int = STEPS


@lru_cache(maxsize=1)  # in each rank, which is one of many
def predictor(kind: str, path: Path, spec: MeshSpec) -> Predictor:
    mesh = build_mesh(spec, groups())
    network = local_network(path, mesh)
    return Predictor(network, mesh, torch.float32, torch.device("cpu"), KINDS[kind])


def evaluated(model: Predictor, job: Job) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Every step's outputs, and what each axis counted."""
    config, (rows, height, width) = model.network.config, job.size
    is_unet = model.kind is SDXL
    prompts = []
    for number, tokens in enumerate(job.tokens):
        seed = 10 * job.seed + number
        pair = unet_prompt(config, seed, tokens, rows) if is_unet else random_prompt(seed, tokens, rows)
        prompts.append(Prompt(pair[0][..., : config.context_width], pair[1][..., : config.pooled_width]))
    generator = torch.Generator().manual_seed(job.seed)
    start, end = torch.randn(2, rows, config.channels, height, width, generator=generator)
    before = [(axis.traffic.sent_bytes, axis.traffic.collectives) for axis in model.mesh.axes]
    kept = model.network.new_job(displaced=job.warmup is not None)
    share, outputs = model.share(rows, prompts), []
    for index in range(job.steps):
        phase: Any = "sync" if job.warmup is None or index < job.warmup else "displaced"
        time = torch.tensor(900.0 - 100 * index + job.seed)
        step = Step(index, phase, kept=kept, sigma=float(time) / 1000)
        outputs += [out.clone() for out in model.outputs(torch.lerp(start, end, 0.1 * index), time, share, step)]
    kept.close()
    counts = [(axis.traffic.sent_bytes, axis.traffic.collectives) for axis in model.mesh.axes]
    return outputs, [(a - c, b - d) for (a, b), (c, d) in zip(counts, before, strict=True)]


def with_recordings(model: Predictor, recorder: Recorder) -> Predictor:
    """The same network, evaluated by recordings."""
    other = replace(model)
    other.captured = CapturedNetwork(other.network, other.mesh, recorder)
    return other


@torch.inference_mode()
def jobs_case(kind: str, path: Path, spec: MeshSpec, jobs: list[Job], lora: bool = False) -> tuple[int, int, int]:
    """Fails where a job's outputs or counts differ. Returns: evaluations that ran as ever, recordings made, and done again."""
    plain, recorder = predictor(kind, path, spec), Recorder()
    model = with_recordings(plain, recorder)
    for number, job in enumerate(jobs):
        if lora and number == 1:
            for parameter in _weights(plain):
                parameter.data.mul_(1.01)
        expected, counts = evaluated(plain, job)
        found, found_counts = evaluated(model, job)
        for step, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, wanted), (number, step, (ours - wanted).abs().max())
        assert found_counts == counts, number
    if lora:
        for parameter in _weights(plain):
            parameter.data.div_(1.01)
    assert not model.captured.notes  # type: ignore[union-attr]
    return recorder.evaluated, recorder.recorded_ones, recorder.done_again


def told_case(path: Path) -> tuple[list[tuple[str, int]], int]:
    """What is told of recordings, and how many were made."""
    recorder, told = Recorder(), list[tuple[str, int]]()
    model = with_recordings(predictor("mmdit", path, MeshSpec()), recorder)
    assert model.captured is not None
    model.captured.tell = lambda what, done: told.append((what, done))
    with torch.inference_mode():
        evaluated(model, Job())
    return told, recorder.recorded_ones


def test_each_recording_is_told_before_and_after(ranks: RankPool, large: Path) -> None:
    ((told, recordings),) = ranks(1, told_case, large)
    assert told == [(captured.RECORDING, 0), (captured.RECORDING, 1)] * recordings and recordings == 2


def _weights(model: Predictor) -> list[Tensor]:
    return [parameter for parameter in model.network.model.parameters() if parameter.ndim == 2]  # type: ignore[attr-defined]


EXACT_JOBS = [Job(), Job(seed=3)]
CASES: dict[str, tuple[str, MeshSpec, list[Job]]] = {
    "mmdit, one rank": ("mmdit", MeshSpec(), EXACT_JOBS),
    "mmdit, one rank, prompts of one length, odd size": ("mmdit", MeshSpec(), [Job((2, 13, 11), (9, 9)), Job((2, 13, 11), (9, 9), 2)]),
    "from scratch, one rank": ("from scratch", MeshSpec(), EXACT_JOBS),
    "unet, one rank": ("unet", MeshSpec(), EXACT_JOBS),
    "mmdit, cfg": ("mmdit", MeshSpec(cfg=2), EXACT_JOBS),
    "unet, cfg": ("unet", MeshSpec(cfg=2), [Job((2, 13, 9)), Job((2, 13, 9), seed=2)]),
    "mmdit, dp": ("mmdit", MeshSpec(dp=2), [Job((3, 16, 12)), Job((3, 16, 12), seed=2)]),
    "mmdit, ulysses": ("mmdit", MeshSpec(ulysses=2), [Job((1, 14, 10)), Job((1, 14, 10), seed=2)]),
    "mmdit, three ulysses": ("mmdit", MeshSpec(ulysses=3), EXACT_JOBS),
    "mmdit, ring": ("mmdit", MeshSpec(ring=2), EXACT_JOBS),
    "mmdit, three ring": ("mmdit", MeshSpec(ring=3), [Job((2, 14, 10)), Job((2, 14, 10), seed=2)]),
    "mmdit, tp": ("mmdit", MeshSpec(tp=2), EXACT_JOBS),
    "mmdit, pp": ("mmdit", MeshSpec(pp=2), EXACT_JOBS),
    "mmdit, cfg and ulysses": ("mmdit", MeshSpec(cfg=2, ulysses=2), EXACT_JOBS),
    "mmdit, ring and ulysses": ("mmdit", MeshSpec(ring=2, ulysses=2), EXACT_JOBS),
    "from scratch, ring": ("from scratch", MeshSpec(ring=2), EXACT_JOBS),
    "unet, bands": ("unet", MeshSpec(patch=2), EXACT_JOBS),
    "unet, three bands, odd size": ("unet", MeshSpec(patch=3), [Job((1, 21, 13)), Job((1, 21, 13), seed=2)]),
    "unet, four bands of a latent too small for them": ("unet", MeshSpec(patch=4), [Job((1, 9, 8), warmup=1)] * 2),
    "unet, cfg and bands": ("unet", MeshSpec(cfg=2, patch=2), EXACT_JOBS),
}  # fmt: skip
# Recorded in the first one; an exact one between; few exact steps; another size; and back.
DISPLACED = [Job(warmup=3), Job(), Job(warmup=1, seed=1), Job((2, 21, 13), warmup=2), Job(warmup=3, seed=2)]
for name, kind, mesh in (
    ("mmdit, displaced ring", "mmdit", MeshSpec(ring=2)),
    ("mmdit, three displaced ring", "mmdit", MeshSpec(ring=3)),
    ("mmdit, displaced ring and ulysses", "mmdit", MeshSpec(ring=2, ulysses=2)),
    ("unet, displaced bands", "unet", MeshSpec(patch=2)),
    ("unet, three displaced bands", "unet", MeshSpec(patch=3)),
    ("unet, cfg and displaced bands", "unet", MeshSpec(cfg=2, patch=2)),
):
    CASES[name] = (kind, mesh, DISPLACED)


@pytest.fixture(scope="module")
def files(unets: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    mmdit = models / "diffusion_models" / "sd3.5-medium.safetensors"
    scratch = write_pickle(tmp_path_factory.mktemp("scratch"))
    return {"mmdit": mmdit, "unet": unets / "unet-tiny.safetensors", "from scratch": scratch}


@pytest.mark.parametrize("name", CASES)
def test_recordings_give_what_runs_as_ever(name: str, ranks: RankPool, files: dict[str, Path]) -> None:
    kind, mesh, jobs = CASES[name]
    for ran, recorded, again in ranks(mesh.world_size, jobs_case, kind, files[kind], mesh, jobs):
        assert again > 0 and recorded <= ran <= recorded + 2, "one of each kind; messages have their places after two"


@pytest.mark.parametrize("kind", ["mmdit", "unet"])
def test_weights_that_change_where_they_lie_keep_their_recordings(
    kind: str, ranks: RankPool, files: dict[str, Path]
) -> None:
    jobs = [Job(tokens=(7,)), Job(tokens=(7,), seed=2)]
    assert ranks(1, jobs_case, kind, files[kind], MeshSpec(), jobs, True) == [(1, 1, 2 * STEPS - 1)]


def outputs_of(model: Predictor, forms: list[tuple[int, int]], residuals: Residuals | None = None) -> list[Tensor]:
    """Of latents of these sizes, one row each, step by step as from KSampler."""
    config, found = model.network.config, []
    for number, (height, width) in enumerate(forms):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(1, config.channels, height, width, generator=generator)
        pair = unet_prompt(config, number, 7) if model.kind is SDXL else random_prompt(number, 7)
        rows = Rows(x, torch.full((1,), 900.0 - number), Prompt(*pair), residuals or Residuals())
        found.append(model.output(rows))
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.inference_mode()
def test_the_least_recently_used_recordings_leave(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    plain, recorder = predictor("mmdit", files["mmdit"], MeshSpec()), Recorder()
    model = with_recordings(plain, recorder)
    a, b, c = (8, 8), (8, 10), (8, 12)
    forms = [a, a, b, b, a, c, c, a, a, b, c]
    assert same(outputs_of(model, forms), outputs_of(plain, forms))
    assert model.captured is not None and len(model.captured._graphs) == len(model.captured._standing) == 2
    # One of each form ran; b left when c came, c when b came again.
    assert (recorder.evaluated, recorder.recorded_ones) == (3, 5)
    model.captured.drop()
    assert not model.captured._graphs and same(outputs_of(model, [a]), outputs_of(plain, [a]))
    assert (recorder.evaluated, recorder.recorded_ones) == (3, 6)


@torch.inference_mode()
def test_weights_that_lie_elsewhere_are_tried_before_they_are_recorded(files: dict[str, Path]) -> None:
    plain, recorder = predictor("mmdit", files["mmdit"], MeshSpec()), Recorder()
    model = with_recordings(plain, recorder)
    assert model.captured is not None
    for version in (0, 1):
        model.captured.at_version(version)
        assert same(outputs_of(model, [(8, 8)] * 3), outputs_of(plain, [(8, 8)] * 3))
    assert (recorder.evaluated, recorder.recorded_ones, recorder.done_again) == (2, 2, 4)
    recorder.fails = True
    model.captured.at_version(2)
    outputs_of(model, [(8, 8)] * 3)
    recorder.fails = False
    model.captured.at_version(3)
    outputs_of(model, [(8, 8)] * 3)
    assert recorder.done_again == 6, "what stood against one recording may not stand against the next"


@torch.inference_mode()
def failing_case(path: Path, kind: str, spec: MeshSpec, job: Job, on: int) -> tuple[list[str], int, int]:
    plain, recorder = predictor(kind, path, spec), Recorder(fails=groups().rank == on)
    model = with_recordings(plain, recorder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stale, "BUCKET_BYTES", 1)  # so that many are on their way where it fails
        expected, counts = evaluated(plain, job)
        found, found_counts = evaluated(model, job)
    assert same(found, expected) and found_counts == counts
    assert model.captured is not None
    return model.captured.take_notes(), recorder.recorded_ones, recorder.done_again


@pytest.mark.parametrize(
    ("kind", "mesh", "warmup"),
    [("mmdit", MeshSpec(tp=2), None), ("unet", MeshSpec(patch=2), 2), ("mmdit", MeshSpec(ring=2), 2)],
    ids=str,
)
def test_where_one_rank_cannot_record_it_computes_beside_those_that_can(
    kind: str, mesh: MeshSpec, warmup: int | None, ranks: RankPool, files: dict[str, Path]
) -> None:
    job = Job(tokens=(7,), warmup=warmup, steps=6)
    other, failing = ranks(2, failing_case, files[kind], kind, mesh, job, 1)
    kinds = 1 if warmup is None else 2
    assert other == ([], kinds, 6 - kinds)
    notes, tried, again = failing
    assert (tried, again) == (kinds, 0)
    assert notes == ["CUDA graphs: an evaluation runs without (NotRecordableError: planted)"] * kinds


@torch.inference_mode()
def test_a_recording_that_fails_is_told_once(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = with_recordings(predictor("mmdit", files["mmdit"], MeshSpec()), Recorder(fails=True))
    with caplog.at_level(logging.WARNING, logger="parallel_backend"):
        outputs_of(model, [(8, 8)] * 5)
    assert [record.getMessage() for record in caplog.records] == [
        "an evaluation can't be a CUDA graph (NotRecordableError: planted): it runs without"
    ]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["mmdit", "unet"])
def test_residuals_are_inputs_and_their_places_tell_recordings_apart(kind: str, files: dict[str, Path]) -> None:
    plain, recorder = predictor(kind, files[kind], MeshSpec()), Recorder()
    model = with_recordings(plain, recorder)
    forms = [(8, 8)] * 3

    def residual(seed: int) -> Tensor:
        shape = (
            (1, 16, model.network.config.hidden) if kind == "mmdit" else (1, CONFIGS["tiny"].block_channels[0], 8, 8)
        )
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    one, two = residual(1), residual(2)
    given = [
        Residuals(output=[one]),
        Residuals(output=[two]),
        Residuals(output=[None, one]),
        Residuals(output=[one, one]),
        Residuals(output=[one, two]),
        *([Residuals(input=[one]), Residuals(input=[one], output=[one])] if kind == "unet" else []),
    ]
    outs = [outputs_of(model, forms, residuals) for residuals in given]
    assert all(same(out, outputs_of(plain, forms, residuals)) for out, residuals in zip(outs, given, strict=True))
    # A UNet is given its bands of residuals: one that stands in two places is two of those.
    assert recorder.recorded_ones == (4 if kind == "mmdit" else 5)
    assert not any(torch.equal(outs[0][2], out[2]) for out in outs[1:])


@torch.inference_mode()
def test_a_prompt_is_copied_where_it_is_another_one(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = captured._copy
    monkeypatch.setattr(captured, "_copy", lambda pairs: (copied.append(len(pairs)), copy(pairs)))
    plain = predictor("unet", files["unet"], MeshSpec())
    model = with_recordings(plain, Recorder())
    jobs = [Job(tokens=(7,)), Job(tokens=(7,), seed=1)]
    for job in jobs:
        assert same(evaluated(model, job)[0], evaluated(plain, job)[0])
    # x and its timesteps at every step. The first recording takes the prompt before it is made.
    of_prompt = copied[0] - 2
    assert of_prompt > 2 and copied == [of_prompt + 2, *[2] * (STEPS - 1), of_prompt + 2, *[2] * (STEPS - 1)]
