"""The training loop, on every rank of a torchrun."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parallel_backend.demo.progress import progress

from . import snapshots
from .autoencoder import AutoencoderTask
from .config import Roles, TrainSpec
from .controlnet import ControlNetTask
from .data import Batch
from .feed import batches, feed
from .mmdit import MMDiTTask
from .sheets import plot_losses
from .unet import UNetTask

Task = AutoencoderTask | MMDiTTask | UNetTask
TASKS: dict[str, type[Task]] = {
    "autoencoder": AutoencoderTask,
    "mmdit": MMDiTTask,
    "unet": UNetTask,
    "controlnet": ControlNetTask,
}
LOWEST_RATE = 0.02


def train(spec: TrainSpec, roles: Roles) -> None:
    """Trains from the last snapshot, or from the start; exports the averaged weights at the end.

    Raises: CheckpointError, ConfigError.
    """
    rank, device = int(os.environ.get("RANK", "0")), _device()
    if roles.world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        Path(spec.output).mkdir(parents=True, exist_ok=True)
        torch.manual_seed(spec.seed)
        task = TASKS[spec.task](spec, device)
        snapshot = snapshots.load(spec, roles)
        if spec.initial and snapshot is None:
            task.start_from(Path(spec.initial))
        group = dist.new_group(roles.model_ranks) if roles.world_size > 1 else None
        first = snapshot.step if snapshot else 0
        if rank in roles.feeds:
            feed(task.source(rank), roles.feeds[rank], first * spec.accumulate, spec.last * spec.accumulate)
        else:
            Run(spec, roles, rank, task, group, snapshot).go()
        if roles.world_size > 1:
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def averaging(decay: float) -> Callable[[Any, Any, Tensor | int], None]:
    """An exponential average that follows a young run closely: after n updates it decays by (1 + n) / (10 + n), at most by `decay`.

    Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """

    def update(averaged: Any, current: Any, updates: Tensor | int) -> None:
        count = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, updates)

    return update


class Run:
    """A model rank's part in a run. The first model rank also writes what the run leaves on disk."""

    def __init__(
        self,
        spec: TrainSpec,
        roles: Roles,
        rank: int,
        task: Task,
        group: dist.ProcessGroup | None,
        snapshot: snapshots.Snapshot | None,
    ) -> None:
        self.spec, self.roles, self.rank, self.task = spec, roles, rank, task
        self.writes = rank == roles.model_ranks[0]
        self.ema = AveragedModel(task.model, multi_avg_fn=averaging(spec.ema_decay))
        self.optimizer = torch.optim.AdamW(
            task.model.parameters(), spec.learning_rate, betas=(0.9, 0.99), weight_decay=spec.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _rate(step, spec))
        self.step, self.losses = 0, []  # type: ignore[var-annotated]
        if snapshot is not None:
            task.model.load_state_dict(snapshot.model)
            self.ema.load_state_dict(snapshot.ema)
            self.optimizer.load_state_dict(snapshot.optimizer)
            self.schedule.load_state_dict(snapshot.schedule)
            self.step, self.losses = snapshot.step, snapshot.losses
        parallel = group is not None and len(roles.model_ranks) > 1
        self.model: nn.Module = DistributedDataParallel(task.model, process_group=group) if parallel else task.model

    def go(self) -> None:
        """Trains to the last step."""
        spec = self.spec
        source = None if self.roles.feeds else self.task.source(self.rank)
        fed = batches(source, self.roles, self.rank, self.step * spec.accumulate, spec.last * spec.accumulate)
        with progress(spec.task, spec.steps, self.step, shown=self.writes) as bar:
            while self.step < spec.last:
                self.losses.append(self._one_step(fed))
                self.step += 1
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
                bar.update(1)
                self._write()
        if self.writes:
            self.task.export(self.ema.module, Path(spec.output))

    def _one_step(self, fed: Iterator[Batch]) -> float:
        """One update; the loss, averaged over its micro-steps, of this rank."""
        spec, total = self.spec, 0.0
        for part in range(spec.accumulate):
            draws = torch.Generator().manual_seed(hash((spec.seed, self.rank, self.step, part)) % 2**62)
            last = part == spec.accumulate - 1
            with nullcontext() if last else self._without_sync(), _autocast(spec, self.task.device):
                loss = self.task.loss(self.model, next(fed), draws) / spec.accumulate
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.task.model.parameters(), spec.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.ema.update_parameters(self.task.model)
        return total

    def _without_sync(self) -> AbstractContextManager[Any]:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _write(self) -> None:
        spec, folder = self.spec, Path(self.spec.output)
        if not self.writes:
            return
        if self.step % spec.sheet_every == 0 or self.step == spec.last:
            self.task.sheet(self.ema.module).save(folder / "samples.png")
            plot_losses(self.losses, folder / "loss.png", f"{spec.task}: {self.step} steps")
        if self.step % spec.save_every == 0 or self.step == spec.last:
            snapshot = snapshots.Snapshot(
                self.step,
                self.task.model.state_dict(),
                self.ema.state_dict(),
                self.optimizer.state_dict(),
                self.schedule.state_dict(),
                self.losses,
            )
            snapshots.save(snapshot, spec, self.roles)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _autocast(spec: TrainSpec, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on GPUs and fp32 on CPUs, unless the run says otherwise."""
    half = spec.dtype == "bfloat16" or (spec.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()


def _rate(step: int, spec: TrainSpec) -> float:
    """A linear rise, then half a cosine down."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    done = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    return LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
