"""Steps are told in order and with their own latents, and on a GPU never at the price of waiting for the step just launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda.device import DEVICE, fake_cuda, on_cuda
from fake_cuda.watch import HostSyncError, Watch
from served import NEGATIVE, POSITIVE
from torch import Tensor

from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.config import MeshSpec, SamplerSpec
from parallel_backend.distributed.control import Control
from parallel_backend.errors import CancelledError
from parallel_backend.rank import sample as sampling_job
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rank.step_messages import SideStream, StepMessages, step_messages
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import LoadModel, Prompt, Result, Sample, StepDone
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.sampling.driver import StepReport
from parallel_backend.sampling.image import sample_latent
from parallel_backend.sampling.parameterization import Flow

STEPS = 6
Told = list[tuple[StepDone, list[Tensor]]]


class LateCopy:
    """Arrives when it is waited for, and not before."""

    def __init__(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor], waits: list[LateCopy]) -> None:
        self._pairs, self._waits = list(zip(tensors, buffers, strict=True)), waits

    def synchronize(self) -> None:
        self._waits.append(self)
        for tensor, buffer in self._pairs:
            buffer.copy_(tensor)


class LateCopier:
    """A stand-in for a stream: what was made, begun and waited for."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.begun: list[LateCopy] = []
        self.waits: list[LateCopy] = []

    def buffer(self, like: Tensor) -> Tensor:
        self.buffers.append(torch.full_like(like, float("nan")))
        return self.buffers[-1]

    def start(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> LateCopy:
        self.begun.append(LateCopy(tensors, buffers, self.waits))
        return self.begun[-1]


def latents(step: int) -> list[Tensor]:
    return [torch.full((1, 4, 2, 2), float(step)), torch.full((1, 4, 2, 2), step + 0.5)]


def told_to(told: Told) -> Callable[[Any, Sequence[Tensor]], None]:
    return lambda done, tensors: told.append((done, list(tensors)))


@pytest.mark.parametrize("shown", [range(STEPS), [STEPS - 1], [], [0, 2, 3]], ids=["all", "last", "none", "some"])
def test_each_step_is_told_when_the_next_is_launched_and_the_last_at_the_end(shown: Sequence[int]) -> None:
    told: Told = []
    copier = LateCopier()
    messages = StepMessages(told_to(told), copier)
    for step in range(STEPS):
        messages.tell(StepDone(step, STEPS), latents(step) if step in shown else [])
        assert len(told) == step and copier.waits == copier.begun[:step]
    messages.finish()
    messages.finish()
    assert [done for done, _ in told] == [StepDone(step, STEPS) for step in range(STEPS)]
    for step, (_, tensors) in enumerate(told):
        expected = latents(step) if step in shown else []
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_two_sets_of_buffers_serve_a_job_and_nothing_that_was_sent_lies_in_them() -> None:
    told: Told = []
    copier = LateCopier()
    messages = StepMessages(told_to(told), copier)
    for step in range(STEPS):
        messages.tell(StepDone(step, STEPS), latents(step))
    messages.finish()
    assert len(copier.buffers) == 4
    own = {buffer.data_ptr() for buffer in copier.buffers}
    assert not own & {tensor.data_ptr() for _, tensors in told for tensor in tensors}


def test_without_a_gpu_a_step_is_told_at_once_and_nothing_is_copied() -> None:
    told: Told = []
    messages = step_messages(told_to(told), torch.device("cpu"), tells=True)
    given = latents(0)
    messages.tell(StepDone(0, 1), given)
    messages.finish()
    assert len(told) == 1 and told[0][1][0] is given[0]


# -- in a whole job ------------------------------------------------------------------------------------------------


def job_of(path: Path, told: Told, cancelled: Callable[[], bool] = lambda: False) -> Result:
    """A sampling with previews in this process."""
    engine, job = Engine(torch.device("cpu")), Job(Control(), told_to(told), cancelled)
    loaded: Any = engine.handle(
        RequestHeader(1, LoadModel(str(path), content_key(path), "float32", MeshSpec())), [], job
    )
    told.clear()
    tensors = [torch.zeros(1, 16, 8, 8), POSITIVE.context, POSITIVE.pooled, NEGATIVE.context, NEGATIVE.pooled]
    spec = SamplerSpec(steps=STEPS, seed=1)
    body = Sample(loaded[0].model, spec, 0, Prompt(1, 2), Prompt(3, 4), preview="all")
    result, _ = engine.handle(RequestHeader(2, body, [tensor_meta(t) for t in tensors]), tensors, job)
    assert isinstance(result, Result)
    return result


def late(monkeypatch: pytest.MonkeyPatch) -> LateCopier:
    copier = LateCopier()
    monkeypatch.setattr(sampling_job, "step_messages", lambda emit, device, tells: StepMessages(emit, copier))
    return copier


def test_a_job_tells_the_same_a_step_later_as_it_does_at_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once: Told = []
    delayed: Told = []
    job_of(large, at_once)
    late(monkeypatch)
    assert job_of(large, delayed).steps == STEPS
    assert [done for done, _ in delayed] == [done for done, _ in at_once] and len(delayed) == STEPS
    for (_, mine), (_, theirs) in zip(delayed, at_once, strict=True):
        assert len(mine) == 2 and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_cancelled_job_waits_for_no_copy_more(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: Told = []
    copier = late(monkeypatch)
    with pytest.raises(CancelledError):
        job_of(large, told, lambda: len(copier.begun) == 3)
    assert [done.index for done, _ in told] == [0, 1] and len(copier.waits) == 2


# -- on the fake device --------------------------------------------------------------------------------------------


class LoggedEvent:
    """An event that tells which step it is of, and when the host waits for it."""

    made = 0
    waited: list[tuple[int, int]]

    def __init__(self, **_: object) -> None:
        self.index, LoggedEvent.made = LoggedEvent.made, LoggedEvent.made + 1

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        LoggedEvent.waited.append((self.index, LoggedEvent.made - 1))


def watched_run(make: Callable[[Any], StepMessages], told: Told) -> None:
    """A sampling with previews on the fake device, where a wait inside a step is an error."""
    spec = SamplerSpec(steps=STEPS, cfg_scale=4.0)
    with fake_cuda(), torch.inference_mode(), Watch(armed=False) as watch:
        messages = make(told_to(told))

        def outputs(x: Tensor, *_: object) -> Sequence[Tensor]:
            watch.armed = True
            return [x * 0.5, x * 0.25]

        def on_step(report: StepReport) -> None:
            messages.tell(StepDone(report.index, report.total), [report.x, report.denoised])

        sample_latent(outputs, spec, Flow(3.0), latent=on_cuda(1, 4, 8, 8), on_step=on_step)
        assert watch.armed
        messages.finish()


def test_no_step_on_a_gpu_waits_for_its_own_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Told = []
    LoggedEvent.made, LoggedEvent.waited = 0, []

    def make(emit: Any) -> StepMessages:
        monkeypatch.setattr(torch.cuda, "Event", LoggedEvent)
        return StepMessages(emit, SideStream(DEVICE))

    watched_run(make, told)
    assert [done.index for done, _ in told] == list(range(STEPS))
    assert all(tensor.device.type == "cpu" for _, tensors in told for tensor in tensors)
    # The wait for each step's copies comes when the next step is queued behind them; the last one's at the end.
    assert LoggedEvent.waited == [(step, min(step + 1, STEPS - 1)) for step in range(STEPS)]


def test_previews_that_are_copied_at_once_are_found() -> None:
    told: Told = []

    def copied(emit: Any) -> Any:
        return StepMessages(lambda done, tensors: emit(done, [x.cpu() for x in tensors]), None)

    with pytest.raises(HostSyncError, match="a copy from cuda to cpu"):
        watched_run(copied, told)


def test_on_ranks_that_tell_nobody_nothing_is_copied() -> None:
    with fake_cuda():
        assert step_messages(told_to([]), DEVICE, tells=False)._copier is None
        assert isinstance(step_messages(told_to([]), DEVICE, tells=True)._copier, SideStream)
