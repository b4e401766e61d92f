"""A backend that differs from what is asked for: restarted where nobody works with it, said where somebody does; what it waits for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from served import sample, wait_until

from parallel_backend import Backend, MeshSpec
from parallel_backend.__main__ import main
from parallel_backend.client import differences as differing
from parallel_backend.client.ending import end
from parallel_backend.client.launcher import unheard
from parallel_backend.client.restart import restart
from parallel_backend.command_line import command_line
from parallel_backend.config import BackendSpec
from parallel_backend.errors import BackendInUseError, BackendLostError, CheckpointError, ConfigError, StartError
from parallel_backend.rpc import own_code
from parallel_backend.rpc import runtime_dir as files
from parallel_backend.rpc.messages import Progress

ROOT = Path(__file__).parents[1]
NAME = "again"


@pytest.fixture
def again(runtime_folder: Path) -> Iterator[str]:
    """The name of a backend that nobody else uses."""
    yield NAME
    end(NAME)


@contextmanager
def another_process(ranks: int, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """One that has attached to the backend, and stays connected."""
    code = f"""
import sys
from parallel_backend import Backend, MeshSpec
backend = Backend({ranks}, "cpu", "{NAME}")
{then}
print("connected", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)  # type: ignore[call-overload]
    try:
        assert process.stdout.readline() == "connected\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            pipe.close()


def asked(ranks: int, **settings: object) -> tuple[Backend, str]:
    """A backend of so many ranks, and what it has to tell."""
    backend = Backend(ranks, "cpu", NAME, **settings)  # type: ignore[arg-type]
    return backend, backend.taken_notes()


# -- restarted ---------------------------------------------------------------------------------------------------


def test_two_and_one_ranks_in_turn_work_without_a_hand(again: str, large: Path) -> None:
    two, note = asked(2)
    assert note == ""
    of_two = two.load_model(large, MeshSpec(cfg=2), "float32")
    expected = sample(of_two)
    one, note = asked(1)
    assert note == f"Restarted backend '{again}': it had 2 ranks, 1 is asked for."
    of_one = one.load_model(large, MeshSpec(), "float32")
    torch.testing.assert_close(sample(of_one), expected, rtol=1e-4, atol=1e-4)
    # What was loaded before asks for its own ranks, and is loaded again.
    assert two.status().ranks == one.status().ranks and len(one.status().ranks) == 1  # looking restarts nothing
    assert torch.equal(sample(of_two), expected)
    assert of_two.note == f"Restarted backend '{again}': it had 1 rank, 2 are asked for."
    assert len(two.status().ranks) == 2 and len(one.status().ranks) == 2
    torch.testing.assert_close(sample(of_one), expected, rtol=1e-4, atol=1e-4)
    assert one.status().clients == [f"pid {os.getpid()}"]


def test_changed_code_and_another_environment_restart_it(again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = asked(1)
    monkeypatch.setenv("GLOO_TRIED", "1")
    second, note = asked(1)
    assert note == f"Restarted backend '{again}': it had GLOO_TRIED unset, here GLOO_TRIED=1."
    assert second.generation != first.generation
    record = files.read_record(again)
    assert record is not None and record.code == own_code.LOADED
    files.write_record(again, msgspec.structs.replace(record, code="0123456789abcdef"))
    third, note = asked(1)
    assert note == f"Restarted backend '{again}': it had other code of this pack, than lies here."
    assert third.generation != second.generation
    assert asked(1)[1] == ""


def test_code_is_known_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    package = tmp_path / "parallel_backend"
    shutil.copytree(ROOT / "parallel_backend", package, ignore=shutil.ignore_patterns("__pycache__"))
    assert own_code.code_hash(package) == own_code.code_hash() == own_code.LOADED
    (package / "version.py").write_text((package / "version.py").read_text() + "\n")
    assert own_code.code_hash(package) != own_code.LOADED


def test_a_process_older_than_the_packs_files_goes_on_and_is_told_where_versions_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend was started after an update, by whoever; this process runs what it loaded before."""
    record = files.BackendRecord(differing.__version__, "g", 1, 1, "", 1, "cpu", code=own_code.LOADED)
    monkeypatch.setattr(differing, "unlike", lambda *_: [])
    monkeypatch.setattr(differing, "LOADED", "of before")
    assert differing.differences(record, BackendSpec(NAME, 1)) == []
    with pytest.raises(ConfigError, match=r"updated to version 9\.9; this process runs version .* Start ComfyUI"):
        differing.differences(msgspec.structs.replace(record, version="9.9"), BackendSpec(NAME, 1))
    monkeypatch.undo()
    assert [*map(str, differing._code(msgspec.structs.replace(record, version="0.0.9", code="old")))] == [
        f"version 0.0.9, this is {differing.__version__}"
    ]


def test_starts_that_want_different_ranks_at_once_leave_one_backend(again: str) -> None:
    """In two processes, each of which is the other's other client: who comes second is told so, or restarts it."""
    code = f"""
from parallel_backend import Backend
from parallel_backend.errors import BackendInUseError, BackendLostError
import sys, time
try:
    backend = Backend(int(sys.argv[1]), "cpu", "{NAME}")
    print(len(backend.status().ranks))
    time.sleep(3)
except BackendInUseError as error:
    print("in use")
"""
    both = [
        subprocess.Popen([sys.executable, "-c", code, ranks], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for ranks in ("1", "2")
    ]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in both)
    assert said in (["1", "in use"], ["2", "in use"], ["1", "2"]), said
    record = files.read_record(again)
    assert record is not None
    agents = subprocess.run(["pgrep", "-f", f"distributed.run.*--name {again} "], capture_output=True, text=True)
    assert agents.stdout.split() == [str(record.agent_pid)]


def test_a_backend_that_falls_while_another_is_asked_for_is_waited_for_and_restarted(again: str) -> None:
    first, _ = asked(1)
    os.kill(first.record.pid, signal.SIGKILL)
    second, note = asked(2)
    assert len(second.status().ranks) == 2 and "it had 1 rank, 2 are asked for" in note
    with pytest.raises(BackendLostError):
        first.check_there(time.time())


# -- in use ------------------------------------------------------------------------------------------------------


def test_another_process_that_is_connected_keeps_it_until_it_leaves_or_is_killed(again: str) -> None:
    with another_process(2) as other:
        mine = Backend.attach(again)
        assert sorted(mine.status().clients) == sorted([f"pid {other.pid}", f"pid {os.getpid()}"])
        with pytest.raises(BackendInUseError) as refused:
            asked(1)
        error = refused.value
        assert error.code == "backend_in_use"
        assert error.message == (
            f"Backend '{again}' has 2 ranks, 1 is asked for, and is in use: others are connected (pid {other.pid})."
        )
        assert error.remedy.startswith("Press Restart in the Parallel MMDiT panel of the sidebar, or run `")
        assert command_line("stop", "--name", again) in error.remedy
        other.kill()  # without a Goodbye
        other.wait()
        wait_until(lambda: mine.status().clients == [f"pid {os.getpid()}"], 10)
    assert len(asked(1)[0].status().ranks) == 1


def test_a_job_that_runs_keeps_it_and_is_named(again: str, large: Path) -> None:
    backend, _ = asked(1)
    model = backend.load_model(large, MeshSpec(), "float32")
    started, stop = threading.Event(), threading.Event()
    with ThreadPoolExecutor() as pool:
        job = pool.submit(
            sample, model, steps=5000, on_step=lambda step: started.set(), should_cancel=lambda: stop.is_set()
        )
        assert started.wait(60)
        with pytest.raises(BackendInUseError, match=r"2 are asked for, and is in use: a job runs there \(Sample\)\."):
            asked(2)
        # A person who presses a button has it restarted all the same; the job is told.
        waited: list[str] = []
        record = restart(again, BackendSpec(again, 2), waiting=lambda seconds, what: waited.append(what))
        with pytest.raises(BackendLostError, match="The backend was stopped while this job ran"):
            job.result(60)
    assert record.world_size == 2 and waited


def test_where_the_environment_alone_differs_it_is_used_as_it_is(again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process(1):
        generation = Backend.attach(again).generation
        monkeypatch.setenv("GLOO_TRIED", "1")
        backend, note = asked(1)
        assert (backend.generation, note) == (generation, "")


def test_a_backend_that_serve_keeps_in_a_terminal_is_its_owners(again: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "parallel_backend",
        "serve",
        "--name",
        again,
        "--world-size",
        "1",
        "--device",
        "cpu",
    ]
    serve = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: files.read_record(again))
        said = r"was started by `parallel-mmdit serve` in a terminal or as a service \(process \d+\)"
        with pytest.raises(ConfigError, match=said):
            asked(2)
        with pytest.raises(ConfigError, match=said):
            restart(again)
        assert len(asked(1)[0].status().ranks) == 1
        backend, note = asked(1, memory_budget=2**30, idle_seconds=60.0)
        assert not note and backend.status().memory_budget == 0, "its owner's"
        others = ["serve", "--name", again, "--world-size", "1", "--device", "cpu", "--models", str(ROOT)]
        assert main(others) == 1 and "runs already, without these --models" in capsys.readouterr().err
    finally:
        serve.terminate()
        serve.wait(30)


def test_a_backend_that_does_not_answer_counts_as_in_use(again: str) -> None:
    backend, _ = asked(1)
    os.kill(backend.record.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BackendInUseError, match="2 are asked for, and doesn't answer"):
            asked(2)
    finally:
        os.kill(backend.record.pid, signal.SIGCONT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_what_runs_does_not_end_for_what_cannot_be_started(again: str) -> None:
    backend, _ = asked(1)
    with pytest.raises(ConfigError, match="GPUs 0, 1 were asked for; torch sees 0 here"):
        Backend(2, "cuda", again)
    with pytest.raises(ConfigError, match="torch sees 0 here"):
        restart(again, BackendSpec(again, 2, "cuda"))
    assert backend.status().generation == backend.generation


# -- restart, as it was ------------------------------------------------------------------------------------------


def test_restart_keeps_what_it_was_started_with_and_what_it_has_taken_over(
    again: str, tmp_path: Path, large: Path
) -> None:
    arguments = ["serve", "--name", again, "--world-size", "1", "--device", "cpu", "--detach"]
    assert main([*arguments, "--models", str(tmp_path), "--idle-seconds", "600"]) == 0
    backend, note = asked(1, memory_budget=60 * 2**20)
    assert note == f"Backend '{again}' has taken over: memory budget 60 MiB a rank (was none)."
    wait_until(lambda: files.read_record(again).memory_budget == 60 * 2**20, 5)  # type: ignore[union-attr]
    before = files.read_record(again)
    after = restart(again)
    assert before is not None and after.generation != before.generation
    assert (after.world_size, after.models, after.idle_seconds) == (1, [str(tmp_path)], 600)
    state = backend.status()
    assert (state.memory_budget, state.idle_seconds) == (60 * 2**20, 600)
    # A rank that falls costs none of it either.
    os.kill(after.pid, signal.SIGKILL)
    wait_until(lambda: (files.read_record(again) or after).generation != after.generation)
    state = backend.status()
    assert (state.memory_budget, state.idle_seconds) == (60 * 2**20, 600)
    with pytest.raises(
        CheckpointError, match="outside this backend's model folders"
    ):  # which still opens no other files
        backend.load_model(large, MeshSpec(), "float32")


def test_nothing_is_restarted_where_nothing_runs_unless_it_is_said_how(again: str) -> None:
    with pytest.raises(StartError, match=f"No backend '{again}' runs"):
        restart(again)
    assert restart(again, BackendSpec(again, 1), unheard).world_size == 1


# -- without a restart -------------------------------------------------------------------------------------------


def test_budget_and_idle_time_of_a_running_backend_are_taken_over(again: str, large: Path) -> None:
    backend, _ = asked(2)
    model = backend.load_model(large, MeshSpec(cfg=2), "float32")
    held = max(model.loaded.resident_bytes)
    other, note = asked(2, memory_budget=held + 2**20, idle_seconds=300)
    assert (
        note
        == f"Backend '{again}' has taken over: memory budget {held / 2**20 + 1:.0f} MiB a rank (was none), idle time 5 min (was 30)."
    )
    assert other.generation == backend.generation
    assert [m.model for m in backend.status().models] == [model.name]
    _, note = asked(2, memory_budget=held - 2**20)
    assert "MiB a rank (was" in note
    wait_until(lambda: not backend.status().models, 10)  # it leaves at once
    with pytest.raises(ConfigError, match="the budget is"):
        sample(model)
    _, note = asked(2, memory_budget=0, idle_seconds=0.5)
    assert (
        note
        == f"Backend '{again}' has taken over: memory budget none (was {held / 2**20 - 1:.0f} MiB a rank), idle time 0.00833 min (was 5)."
    )
    assert torch.isfinite(sample(model)).all()
    wait_until(lambda: not backend.status().models, 10)  # after the new idle time
    assert asked(2)[1] == "", "who asks for nothing changes nothing"


# -- what is seen meanwhile --------------------------------------------------------------------------------------


def test_a_start_says_what_it_waits_for_in_order(again: str) -> None:
    seen: list[str] = []
    asked(2, waiting=lambda seconds, what: seen.append(what))
    stages = list(dict.fromkeys(seen))
    order = [
        "starting torchrun",
        "importing torch",
        "ranks meet, 1 of 2 there",
        "ranks meet, 2 of 2 there",
        *files.STAGES,
    ]
    assert stages == sorted(stages, key=order.index) and "importing torch" in stages, stages
    assert files.stages(again, 0.0) == {"rank0": files.STAGES[-1], "rank1": files.STAGES[-1]}


def test_loading_tells_its_bytes_which_rise_to_their_total(backend2: Backend, large: Path, models: Path) -> None:
    backend2.unload()
    told: list[Progress] = []
    backend2.on_progress = told.append
    try:
        model = backend2.load_model(large, MeshSpec(cfg=2), "float32")
        assert _rises(told, f"loading {large.name}") and told[-1].total == model.loaded.resident_bytes[0]
        assert told[-1].text.startswith(f"loading {large.name}: ") and told[-1].text.endswith(" MiB a rank")
        told.clear()
        backend2.load_vae(models / "vae" / "sd3_vae.safetensors", "float32")
        assert _rises(told, "loading sd3_vae.safetensors")
        told.clear()
        backend2.unload()
        sample(model)  # which loads it again by itself
        assert _rises(told, f"loading {large.name}")
    finally:
        backend2.on_progress = None


def _rises(told: list[Progress], what: str) -> bool:
    of_it = [event for event in told if event.what == what]
    done = [event.done for event in of_it]
    assert done and {event.unit for event in of_it} == {"bytes"} and len({event.total for event in of_it}) == 1
    return done == sorted(done) and done[-1] == of_it[-1].total


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Progress("loading x.safetensors", 31 * 2**30 // 10, 82 * 2**30 // 10, "bytes"), "loading x.safetensors: 3.1 of 8.2 GiB a rank"),
        (Progress("loading x.safetensors", 0, 5 * 2**20, "bytes"), "loading x.safetensors: 0.0 of 5.0 MiB a rank"),
        (Progress("laying patches on the weights", 3, 40), "laying patches on the weights: 3 of 40"),
        (Progress("capturing a graph", 0, 1), "capturing a graph"),
        (Progress("capturing a graph", 1, 1), "capturing a graph: done"),
    ],
)  # fmt: skip
def test_progress_reads_so(event: Progress, text: str) -> None:
    assert event.text == text


# -- commands that work as written -------------------------------------------------------------------------------


@pytest.mark.parametrize("has_script", [True, False])
def test_a_command_works_as_written_in_any_folder(
    has_script: bool, runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a folder"
    place.mkdir()
    if has_script:
        script = place / "parallel-mmdit"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m parallel_backend "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}/usr/bin{os.pathsep}/bin")
    line = command_line("stop", "--name", "not there")
    assert ("parallel-mmdit stop" in line) == has_script and line.endswith("stop --name 'not there'")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(["sh", "-c", line], cwd=place, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "can't be used" not in done.stderr, done.stderr
    assert "No backend 'not there' runs" in done.stderr
