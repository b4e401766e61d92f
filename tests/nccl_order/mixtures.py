"""What ranks do while their calls are written down: whole requests, as a backend gets them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hung_inside import LATENTS, OF_MMDITS, OF_UNETS, TOKENS, Make, later
from torch import Tensor

from parallel_backend import MeshSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.config import SamplerSpec
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.mesh import Groups
from parallel_backend.errors import CancelledError
from parallel_backend.extras.target import Target
from parallel_backend.models.prediction import Predictor
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rpc.extras import AnyExtra, KeptAttention
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import (
    Decode,
    Encode,
    Forward,
    LoadModel,
    LoadVAE,
    Prompt,
    Sample,
    Unload,
)
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.sampling.noise import StepNoise

from .recorder import Recorder
from .trace import Trace


@dataclass(frozen=True)
class Sampling:
    """A job: `rows` pictures, prompts of so many text tokens, given up when asked for the so-many-th time."""

    spec: SamplerSpec
    rows: int = 3
    tokens: tuple[int, ...] = (13, 9)
    given_up: int | None = None


def sampling(given_up: int | None = None, rows: int = 3, tokens: tuple[int, ...] = (13, 9), **spec: Any) -> Sampling:
    settings: dict[str, Any] = {"sampler": "euler_ancestral", "cfg_scale": 4.0, "steps": 2, "seed": 1}
    return Sampling(SamplerSpec(**settings | spec), rows, tokens, given_up)


class RecordedRank:
    """An engine among gloo ranks, its calls written down."""

    def __init__(self) -> None:
        gc.freeze()  # each model that leaves has all that is left looked through
        self.recorder = Recorder()
        with self.recorder.recording():
            self._control, self._engine = Control(), Engine(torch.device("cpu"))

    def ask(self, body: Any, tensors: Sequence[Tensor] = (), given_up: int | None = None) -> Any:
        """The reply's body; None where the job was given up."""
        asked = 0

        def cancelled() -> bool:
            nonlocal asked
            asked += 1
            return given_up is not None and asked >= given_up and self._control.rank == 0

        header = RequestHeader(1, body, [tensor_meta(tensor) for tensor in tensors])
        job = Job(self._control, lambda body, tensors: None, cancelled)
        with suppress(CancelledError):
            reply = self._engine.handle(header, list(tensors), job)[0]
            assert given_up is None, f"asked {asked} times, the job went on"
            return reply
        assert given_up is not None
        return None

    def made(self, model: str, make: Make, size: tuple[int, int, int]) -> Sequence[AnyExtra]:
        """Of the same numbers on every rank."""
        torch.manual_seed(3)
        return make(Target(self._engine.residents.model(model, Predictor), *size[1:]))


@cache
def this_rank() -> RecordedRank:
    return RecordedRank()


def shared_draw(draw: Callable[[StepNoise], Tensor]) -> Callable[[StepNoise], Tensor]:
    """On GPUs what is drawn between steps is rank 0's."""
    return lambda noise: noise._share(draw(noise))


def record_samplings(
    path: Path, mesh: MeshSpec, jobs: Sequence[Sampling], size: tuple[int, int, int], single: Sequence[int] = ()
) -> tuple[Trace, int]:
    """A model is loaded, does these jobs, is called once for each number of rows in `single`, and leaves.

    Args:
        size: channels, rows and columns of the latents.
    Returns: the calls, and how many of the first were made to load it.
    """
    rank = this_rank()
    config = _widths(size[0])
    with rank.recorder.recording() as trace, mock.patch.object(StepNoise, "gaussian", shared_draw(StepNoise.gaussian)):
        model = rank.ask(LoadModel(str(path), content_key(path), "float32", mesh)).model
        loading = len(trace)
        for job in jobs:
            prompts = [tensor for tokens in job.tokens for tensor in _prompt(tokens, *config)]
            named = [Prompt(1 + 2 * i, 2 + 2 * i) for i in range(len(job.tokens))]
            rank.ask(Sample(model, job.spec, 0, *named), [torch.zeros(job.rows, *size), *prompts], job.given_up)
        for rows in single:
            tensors = [torch.ones(rows, *size), torch.full((rows,), 500.0), *_prompt(9, *config, rows=rows)]
            rank.ask(Forward(model, 0, 1, 2, 3), tensors)
        rank.ask(Unload([model]))
    return trace, loading


def record_inside(path: Path, mesh: MeshSpec, size: tuple[int, int, int]) -> tuple[Trace, int]:
    """A model is loaded and evaluated twice with each that can hang inside; it samples with those that a whole sampling can have.

    Returns: as `record_samplings`.
    """
    rank, cases = this_rank(), OF_MMDITS if size[0] == 16 else OF_UNETS
    prompts = [_prompt(TOKENS, *_widths(size[0])) for _ in range(2)]
    rows = [torch.cat([of_cond, of_uncond]) for of_cond, of_uncond in zip(*prompts, strict=True)]
    x, times = torch.zeros(LATENTS, *size), torch.full((2 * LATENTS,), 500.0)
    with rank.recorder.recording() as trace, mock.patch.object(StepNoise, "gaussian", shared_draw(StepNoise.gaussian)):
        model = rank.ask(LoadModel(str(path), content_key(path), "float32", mesh)).model
        loading = len(trace)
        for make in cases.values():
            specs = rank.made(model, make, size)
            for inside in (specs, later(specs)):
                given = [torch.cat([x, x]), times, *(row.repeat_interleave(LATENTS, 0) for row in rows)]
                named = [spec.each(_numbered(given)) for spec in inside]
                rank.ask(Forward(model, 0, 1, 2, 3, extras=named, branches=[0, 1]), given)
            if not any(spec.reports or isinstance(spec, KeptAttention) for spec in specs):
                given = [x, *prompts[0], *prompts[1]]
                named = [spec.each(_numbered(given)) for spec in specs]
                rank.ask(Sample(model, sampling(steps=1).spec, 0, Prompt(1, 2), Prompt(3, 4), extras=named), given)
        rank.ask(Unload([model]))
    return trace, loading


def _numbered(tensors: list[Tensor]) -> Callable[[Tensor], int]:
    """Each comes to `tensors`, and is its place there from then on."""

    def number(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    return number


def record_bands(paths: Sequence[Path], channels: int, sizes: Sequence[tuple[int, int, int]]) -> Trace:
    """A VAE decodes and encodes pictures of these sizes (batch, rows and columns of cells), and gives up one of each."""
    rank = this_rank()
    key = "-".join(map(content_key, paths))
    with rank.recorder.recording() as trace:
        vae = rank.ask(LoadVAE([str(path) for path in paths], key, "float32")).model
        for batch, rows, columns in sizes:
            latent, image = torch.zeros(batch, channels, rows, columns), torch.zeros(batch, rows * 8, columns * 8, 3)
            for given_up in (None, 3) if rows >= torch.distributed.get_world_size() else (None,):
                rank.ask(Decode(vae, 0), [latent], given_up)
                rank.ask(Encode(vae, 0), [image], given_up)
        rank.ask(Unload([vae]))
    return trace


def record_with_one_group_both_ways(
    path: Path, mesh: MeshSpec, jobs: Sequence[Sampling], size: tuple[int, int, int]
) -> tuple[Trace, int]:
    """`record_samplings` of a rank that has no groups apart for what must not wait for each other."""
    of = Groups.of
    this_rank.cache_clear()
    with mock.patch.object(Groups, "of", lambda groups, ranks, use="": of(groups, ranks)):
        recorded = record_samplings(path, mesh, jobs, size)
    this_rank.cache_clear()
    return recorded


def _widths(channels: int) -> tuple[int, int]:
    """Of a prompt and a pooled prompt: SD3's or SDXL's."""
    return (4096, 2048) if channels == 16 else (2048, 2816)


def _prompt(tokens: int, width: int, pooled: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, tokens, width), torch.ones(rows, pooled)
