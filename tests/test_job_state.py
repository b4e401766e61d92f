"""What a backend's status tells of the job that runs, of the last one's cost, and of the models held."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from served import sample

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.__main__ import describe
from parallel_backend.rpc.messages import BackendState, Progress, StepDone, Welcome
from parallel_backend.serving.state_board import StateBoard


def seen_during(work: Callable[[], object], name: str) -> list[BackendState]:
    """What a second connection is told while `work` runs, and once after it."""
    states, watcher = [], Backend.attach(name)
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        states.append(watcher.status())
        time.sleep(0.01)
    thread.join()
    states.append(watcher.status())
    watcher.close()
    return states


def test_a_samplings_steps_rise_and_its_cost_stays(backend2: Backend, model: RemoteModel) -> None:
    states = seen_during(lambda: sample(model, steps=40), "test2")
    jobs = [state.job for state in states if state.job is not None and state.job.total]
    done = [job.done for job in jobs]
    assert done == sorted(done) and done[0] < done[-1]
    assert {(job.kind, job.model, job.total) for job in jobs} == {("Sample", "sd3.5-large.safetensors", 40)}
    assert 0 < (jobs[-1].step_seconds or 0) < jobs[-1].seconds
    assert f"runs Sample sd3.5-large.safetensors of pid {os.getpid()} for" in describe(
        next(state for state in states if state.job == jobs[-1])
    )
    last = states[-1]
    assert last.job is None and last.quiet >= 0 and last.last is not None
    assert (last.last.kind, last.last.steps, last.last.model) == ("Sample", 40, "sd3.5-large.safetensors")
    assert last.last.sent_bytes > 0 and 0 <= (last.last.waited or 0) < last.last.seconds
    assert "last Sample: sd3.5-large.safetensors, 40 steps in" in describe(last)


def test_a_models_axes_are_told_from_the_outermost_in(backend2: Backend, large: Path) -> None:
    backend2.load_model(large, MeshSpec(ulysses=2), "float32")
    state = backend2.status()
    assert state.models[-1].axes == {"ulysses": 2} and state.models[-1].patched == 0


def test_a_samplings_cost_outlives_other_jobs(backend2: Backend, model: RemoteModel) -> None:
    sample(model, steps=3)
    model.leave()
    state = backend2.status()
    assert state.last is not None and state.last.steps == 3
    assert model.name not in {held.model for held in state.models}


def test_what_progress_tells_is_told_until_the_first_step() -> None:
    board = StateBoard("b", Welcome("g", 2, "cpu"))
    board.begin("LoadModel", "a.safetensors", "pid 1")
    board.tell(Progress("loading a.safetensors", 3 * 2**30, 8 * 2**30, "bytes"))
    job = board.snapshot(0).job
    assert job is not None
    assert (job.what, job.done, job.total, job.unit) == ("loading a.safetensors", 3 * 2**30, 8 * 2**30, "bytes")
    assert "loading a.safetensors: 3.0 of 8.0 GiB a rank" in describe(board.snapshot(0))
    board.tell(StepDone(0, 5))
    job = board.snapshot(0).job
    assert job is not None and (job.what, job.done, job.total, job.step_seconds) == ("", 1, 5, None)
