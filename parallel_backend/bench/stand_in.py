"""One process plays a rank of a mesh whose other ranks are not there: what it receives comes at once, of the right shape.

It is a sampling job as the ranks run it, model, sampler, pipeline and all, over torch's fake process group.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from ..config import CELL, MeshSpec, SamplerSpec
from ..distributed.control import Control
from ..distributed.journal import Entry, Journal
from ..distributed.kernel_trial import choose_kernel
from ..distributed.kernels import Use
from ..distributed.mesh import Mesh, build_mesh
from ..distributed.stale import Step
from ..errors import ConfigError
from ..extras.reading import Extras
from ..models.checkpoint import load_parameters
from ..models.families import OpenedModel
from ..models.prediction import Predictor
from ..rank.allowed_files import AllowedFiles
from ..rank.control_nets import ControlNets
from ..rank.jobs import Job
from ..rank.residents import Residents
from ..rank.sample import run_sample
from ..rpc.messages import Prompt, Reply, Sample, StepDone
from ..rpc.state import Swap
from ..small_checkpoints.prompts import random_prompt, random_sdxl_prompt
from .device_time import captured, profile, timed

# Steps whose time doesn't count: memory is new, kernels are loaded, a prompt's keys and values are made.
FIRST_STEPS = 1
MMDIT_TEXT, UNET_TEXT = 154, 77


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A picture with guidance on a mesh: `size` pixels high, and as wide unless `width` says otherwise.

    `warmup` steps are exact, after which `steps` - `warmup` are displaced; None has none displaced. With `graphs` a step is one
    CUDA graph, of those that count.
    """

    mesh: MeshSpec
    size: int
    width: int = 0
    steps: int = 4
    warmup: int | None = None
    num_patches: int = 0
    graphs: bool = False

    @property
    def counted(self) -> int:
        """The first step that counts: the others are warm-up of one kind or the other."""
        return max(FIRST_STEPS, (self.warmup or 0) + (self.warmup is not None))

    @property
    def spec(self) -> SamplerSpec:
        return SamplerSpec(steps=self.steps, seed=1, warmup_steps=self.warmup, num_patches=self.num_patches)


class Played(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the rank did, and seconds of a step in which its GPU ran a kernel; None on a CPU, which is always at work."""

    entries: list[Entry]
    busy: float | None = None


@dataclass(frozen=True)
class Subject:
    """A model that any rank of any mesh can be built of."""

    opened: OpenedModel
    device: torch.device
    dtype: torch.dtype

    @property
    def is_unet(self) -> bool:
        return self.opened.kind.name == "unet"


@torch.inference_mode()
def play(subject: Subject, run: Run, rank: int) -> Played:
    """The journal of that rank in that run. No process group may be there yet, and none is left.

    Raises: ConfigError: a mesh that the model can't have, or a run without a step that counts.
    """
    run.mesh.check_axes(subject.opened.kind.axes, subject.opened.config.family)
    if run.steps <= run.counted:
        raise ConfigError(
            f"steps={run.steps} leaves none after {run.counted} that don't count.",
            "Use more steps, or a shorter warm-up.",
        )
    assert not dist.is_initialized()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    control = Control()  # made alone: what ranks tell each other beside tensors, this one tells itself
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=run.mesh.world_size)
    try:
        predictor = predictor_of(subject, build_mesh(run.mesh))
        entries = journal_of(subject, predictor, run, control)
        if run.graphs:
            entries = paced(entries, run, graph_seconds(subject, predictor, run))
        return Played(entries, _busy(subject, predictor, run, control))
    finally:
        dist.destroy_process_group()
        gc.collect()


def predictor_of(subject: Subject, mesh: Mesh) -> Predictor:
    """This rank's part of the model, as an engine loads it."""
    opened, device, dtype = subject.opened, subject.device, subject.dtype
    heads = -(-opened.config.heads // (mesh.tp.degree * mesh.ulysses.degree))
    kernel, _ = choose_kernel("auto", Use(device, dtype, mesh.ring.degree > 1, heads, opened.config.head_dim))
    with torch.device("meta"):
        model = opened.build(mesh, kernel)
    load_parameters(model, opened.source, device=device, dtype=dtype, unread=opened.unread(model))
    network = opened.network(model.requires_grad_(False).eval(), mesh, kernel, device, dtype)
    return Predictor(network, mesh, dtype, device, opened.kind)


def journal_of(subject: Subject, predictor: Predictor, run: Run, control: Control) -> list[Entry]:
    axes = {axis.name: axis.traffic for axis in predictor.mesh.axes}
    with Journal(axes, predictor.device) as journal:
        _sample(subject, predictor, run, control, journal.step)
    return journal.entries()


def _busy(subject: Subject, predictor: Predictor, run: Run, control: Control) -> float | None:
    if predictor.device.type != "cuda":
        return None
    seen = profile(lambda: _sample(subject, predictor, run, control, lambda: None), predictor.device)
    return seen.busy / 1000 / run.steps


def graph_seconds(subject: Subject, predictor: Predictor, run: Run) -> float:
    """Of an evaluation as one CUDA graph, messages included that take no time.

    Raises: ConfigError: stages of patches, whose evaluations are many.
    """
    if run.mesh.pp > 1 and run.warmup is not None:
        raise ConfigError("PipeFusion's stages are no CUDA graph.", "Leave graphs out, or displaced.")
    latent, prompts = _inputs(subject, predictor, run)
    x, displaced = latent.to(predictor.device), run.warmup is not None
    share = predictor.share(1, [predictor.prompt(*prompt, 1) for prompt in prompts])
    kept = predictor.network.new_job(displaced)
    predictor.outputs(x, torch.tensor(500.0), share, Step(0, "sync", kept=kept))
    step = Step(1, "displaced" if displaced else "sync", kept=kept)
    graph, _ = captured(lambda: predictor.outputs(x, torch.tensor(500.0), share, step))
    return timed(graph.replay, predictor.device, 2, 5).whole / 1000


def paced(entries: Sequence[Entry], run: Run, seconds: float) -> list[Entry]:
    """The same messages at the same shares of a step that computes for so long, and without Python's time."""
    ends = [at for at, entry in enumerate(entries) if entry.what == "step"]
    counted = entries[ends[run.counted - 1] + 1 : ends[-1] + 1]
    share = seconds * (len(ends) - run.counted) / sum(entry.seconds for entry in counted)
    return [msgspec.structs.replace(entry, seconds=entry.seconds * share, host=0.0) for entry in entries]


def _inputs(subject: Subject, predictor: Predictor, run: Run) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    config = predictor.network.config
    if subject.is_unet:
        widths = {"context_width": config.context_width, "pooled_width": config.pooled_width}
        prompts = [random_sdxl_prompt(seed, UNET_TEXT, **widths) for seed in (1, 2)]
    else:
        prompts = [random_prompt(seed, MMDIT_TEXT) for seed in (1, 2)]
    return torch.zeros(1, config.channels, run.size // CELL, (run.width or run.size) // CELL), prompts


def _sample(subject: Subject, predictor: Predictor, run: Run, control: Control, on_step: Callable[[], object]) -> None:
    latent, prompts = _inputs(subject, predictor, run)
    tensors = [latent, *(tensor for prompt in prompts for tensor in prompt)]
    body = Sample("stand-in", run.spec, 0, Prompt(1, 2), Prompt(3, 4))

    def emit(reply: Reply, _: Sequence[Tensor]) -> None:
        if isinstance(reply, StepDone):
            on_step()

    job = Job(control, emit, lambda: False)
    none = ControlNets(Residents(predictor.device, 0, 1, lambda: None), AllowedFiles(), lambda: None)
    run_sample(body, tensors, job, lambda: (predictor, Swap()), none, Extras())
