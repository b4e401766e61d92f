"""What a rank of a pool is asked for: whole pictures and single evaluations, by the backend's own engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.config import MeshSpec, SamplerSpec
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.stale import EXACT, Step
from parallel_backend.models.prediction import Predictor
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rpc.conditioning import Conditioning
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import (
    ControlUse,
    Decode,
    LoadControl,
    LoadModel,
    LoadVAE,
    Request,
    Sample,
)
from parallel_backend.rpc.wire import tensor_meta

Prompts = tuple[Conditioning, Conditioning]


@cache
def _engine(device: str) -> tuple[Engine, Control]:
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    control = Control(None, where)
    return Engine(where, sharers=control.world_size), control


def _ask(device: str, body: Request, tensors: Sequence[Tensor] = ()) -> tuple[Any, list[Tensor]]:
    engine, control = _engine(device)
    header = RequestHeader(1, body, [tensor_meta(tensor) for tensor in tensors])
    return engine.handle(header, list(tensors), Job(control, lambda body, tensors: None, lambda: False))


def _load(device: str, path: Path, mesh: MeshSpec) -> str:
    loaded, _ = _ask(device, LoadModel(str(path), content_key(path), "float32", mesh))
    return loaded.model


def sampled(
    device: str,
    path: Path,
    mesh: MeshSpec,
    latent: Tensor,
    prompts: Prompts,
    spec: SamplerSpec,
    control: tuple[Path, Tensor] | None = None,
) -> Tensor:
    """The latent of a job that all ranks run; `control` is a ControlNet on both prompts, and its hint."""
    name = _load(device, path, mesh)
    positive, negative = prompts
    tensors, controls = [latent], list[ControlUse]()

    def attach(tensor: Tensor) -> int:
        tensors.append(tensor)
        return len(tensors) - 1

    if control is not None:
        loaded, _ = _ask(device, LoadControl(str(control[0]), content_key(control[0]), name))
        controls = [ControlUse(loaded.model, attach(control[1]), 0.8)]
    named = [msgspec.structs.replace(prompt.prompt(attach), controls=controls) for prompt in (positive, negative)]
    _, (out, *_) = _ask(device, Sample(name, spec, 0, *named), tensors)
    return out.cpu()


@torch.inference_mode()
def evaluated(device: str, path: Path, mesh: MeshSpec, given: Sequence[Tensor], displaced: bool) -> Tensor:
    """The model's output; with `displaced`, that of the third evaluation of the same input, on what the second sent."""
    engine, _ = _engine(device)
    predictor = engine.residents[_load(device, path, mesh)].model
    assert isinstance(predictor, Predictor)
    x, timesteps, context, pooled = (tensor.to(predictor.device) for tensor in given)
    prepared = predictor.network.prepare(context, pooled)
    if not displaced:
        return predictor.network(x, timesteps, prepared, EXACT).cpu()
    kept = predictor.network.new_job(displaced=True)
    for index in range(3):
        out = predictor.network(
            x, timesteps, prepared, Step(index, "displaced" if index else "sync", kept=kept)
        ).clone()
    kept.close()
    return out.cpu()


def decoded(device: str, path: Path, latent: Tensor, dtype: str = "float32") -> Tensor | None:
    """The image of a latent, on rank 0."""
    loaded, _ = _ask(device, LoadVAE([str(path)], content_key(path), dtype))
    _, images = _ask(device, Decode(loaded.model, 0), [latent])
    return images[0].cpu() if images else None


def decoding_cost(device: str, path: Path, latent: Tensor, dtype: str) -> tuple[int, float]:
    """Bytes at the peak on this rank, beside what it holds anyway, and seconds, of a decode that isn't the first."""
    decoded(device, path, latent, dtype)
    held = 0
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    decoded(device, path, latent, dtype)
    spent = time.perf_counter() - begun
    return (torch.cuda.max_memory_allocated() - held if device == "cuda" else 0), spent


def communicator_costs() -> list[tuple[str, int]]:
    """Bytes of the card that each communicator takes, of all its ranks together, in the order in which meshes make them."""
    sent, received = (torch.ones(2**20, device="cuda:0") for _ in range(2))
    ranks = list(range(dist.get_world_size()))
    free, costs = _free_everywhere(), []

    def note(name: str) -> None:
        nonlocal free
        now = _free_everywhere()
        costs.append((name, free - now))
        free = now

    dist.all_reduce(sent)
    note("the first: all ranks, a sum")
    for name in ("a second over the same ranks", "a third"):
        dist.all_reduce(sent, group=dist.new_group(ranks))
        note(name)
    stages = dist.new_group(ranks)
    if dist.get_rank() == 0:
        dist.send(sent, 1, group=stages)
    elif dist.get_rank() == 1:
        dist.recv(received, 0, group=stages)
    note("a pair of stages: one message")
    ring = dist.new_group(ranks)
    following, previous = ((dist.get_rank() + turn) % len(ranks) for turn in (1, -1))
    ops = [dist.P2POp(dist.isend, sent, following, ring), dist.P2POp(dist.irecv, received, previous, ring)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    note("a ring: messages to neighbours at once")
    return costs


def _free_everywhere() -> int:
    """Bytes of the card that are free, once every rank has come here and its GPU is done."""
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))  # on the CPU, over gloo
    free = torch.cuda.mem_get_info()[0]
    dist.all_reduce(torch.zeros(1))
    return free
