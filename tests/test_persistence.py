"""A real backend that stays: found again by whoever asks, told from what is left of others, ended and started anew."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import msgspec
import pytest
import torch
from served import sample, wait_until
from torch import Tensor

from parallel_backend import Backend, MeshSpec, RemoteModel
from parallel_backend.__main__ import main
from parallel_backend.client import connection, requirements
from parallel_backend.client.remote import Step
from parallel_backend.doctor.installed import versions
from parallel_backend.errors import (
    BackendInUseError,
    BackendLostError,
    CancelledError,
    ConfigError,
    StartError,
)
from parallel_backend.rank.server import ends_after, pause_before
from parallel_backend.rpc import runtime_dir as files

ROOT = Path(__file__).parents[1]


def test_the_second_load_reads_nothing_and_gives_the_same(backend2: Backend, large: Path, expected: Tensor) -> None:
    backend2.load_model(large, MeshSpec(cfg=2), "float32")
    again = backend2.load_model(large, MeshSpec(cfg=2), "float32")
    assert again.loaded.bytes_read == [0, 0]
    assert torch.equal(sample(again), expected)


def test_another_client_finds_backend_and_model(backend2: Backend, large: Path, expected: Tensor) -> None:
    other = Backend(2, "cpu", "test2")
    assert other.generation == backend2.generation
    backend2.load_model(large, MeshSpec(cfg=2), "float32")
    model = other.load_model(large, MeshSpec(cfg=2), "float32")
    assert model.loaded.bytes_read == [0, 0]
    assert torch.equal(sample(model), expected)
    other.close()
    assert backend2.status().ranks


def test_a_connection_that_nobody_closed_can_be_collected(backend2: Backend) -> None:
    """As after an error whose traceback refers to it: in a cycle, where sockets may be finalised last."""
    code = "import gc; from parallel_backend import Backend; b = Backend.attach('test2'); b.itself = b; del b; gc.collect()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
    assert backend2.status().ranks


def test_a_closed_connection_says_so(backend2: Backend) -> None:
    other = Backend.attach("test2")
    other.close()
    other.close()
    with pytest.raises(ConfigError, match="was closed"):
        other.status()


@pytest.fixture(scope="module")
def alone(runtime_folder: Path) -> Iterator[str]:
    """The name of a backend of one rank: who needs it starts it, or finds what a test before has left."""
    yield "alone"
    with suppress(StartError):
        Backend.attach("alone").stop()


def test_two_starts_at_once_make_one_backend_which_outlives_both(alone: str) -> None:
    code = f"from parallel_backend import Backend; print(Backend(1, 'cpu', '{alone}').generation)"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    generations = {process.communicate(timeout=120)[0].strip() for process in both}
    backend = Backend.attach(alone)
    assert generations == {backend.generation}
    backend.close()


def test_a_stopped_backend_is_started_again_by_the_next_request(large: Path, alone: str) -> None:
    backend = Backend(1, "cpu", alone)
    model = backend.load_model(large, MeshSpec(), "float32")
    before = sample(model)
    Backend.attach(alone).stop()
    assert files.read_record(alone) is None
    with pytest.raises(StartError, match=f"No backend '{alone}' runs"):
        Backend.attach(alone)
    assert torch.equal(sample(model), before)
    backend.close()


def test_an_idle_backend_lets_its_models_go_and_then_ends_by_itself(runtime_folder: Path, large: Path) -> None:
    backend = Backend(1, "cpu", "idle", idle_seconds=0.5)
    model = backend.load_model(large, MeshSpec(), "float32")
    wait_until(lambda: not backend.status().models, 10)
    assert backend.status().cached_bytes == 0 and files.read_record("idle") is not None
    assert torch.isfinite(sample(model)).all(), "it comes back by itself"
    assert files.wait_until_gone(backend.record.agent_pid, 40)
    assert files.read_record("idle") is None
    backend.close()


@pytest.mark.parametrize(("idle", "end"), [(0.5, 4.0), (1800, 14400), (14400, 14400), (36000, 36000)])
def test_processes_outlive_their_models_for_hours_and_not_for_days(idle: float, end: float) -> None:
    assert ends_after(idle) == end


def test_a_start_that_fails_says_why_and_leaves_no_process(
    runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchlink0")
    with pytest.raises(StartError, match=r"(?s)backend\.log.*Its log ends:\n.*nosuchlink0") as caught:
        Backend(1, "cpu", "nolink")
    assert re.match(r"Backend 'nolink' ended while it started: [\w.]*Error: .*nosuchlink0", caught.value.message)
    assert "\n" not in caught.value.brief and "Its log says more" in caught.value.remedy
    marks = subprocess.run(["pgrep", "-f", "name nolink"], capture_output=True, text=True, check=False).stdout.split()
    assert not [pid for pid in marks if files.is_alive(int(pid))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_are_not_there_are_named(runtime_folder: Path) -> None:
    with pytest.raises(ConfigError, match="GPUs 0, 1 were asked for; torch sees 0 here"):
        Backend(2, "cuda", "nogpu")


def test_folder_and_socket_belong_to_their_user_alone(backend2: Backend) -> None:
    folder = files.runtime_dir("test2")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "socket").stat().st_mode) & 0o077 == 0


def test_status_tells_ranks_models_and_jobs(backend2: Backend, model: RemoteModel) -> None:
    before = backend2.status().jobs_done
    sample(model)
    state = backend2.status()
    assert [rank.rank for rank in state.ranks] == [0, 1]
    assert all(rank.host == socket.gethostname() and rank.used_bytes > 0 for rank in state.ranks)
    assert state.jobs_done == before + 1 and state.running == ""
    assert model.name in {m.model for m in state.models}


def test_cpu_ranks_dont_push_each_other_off_their_cores(backend2: Backend) -> None:
    threads = [int(t) for rank in backend2.status().ranks for t in os.listdir(f"/proc/{rank.pid}/task")]
    assert len(threads) > 10 and {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}


def doctor() -> str:
    """What `parallel-mmdit doctor` prints; the links, which test_links proves, are left out."""
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(StringIO()) as page:
        patched.setattr("parallel_backend.doctor.links.prove_links", lambda spec: [])
        main(["doctor"])
    return page.getvalue()


def test_the_command_line_tells_and_stops(
    runtime_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> str:
        assert main([*arguments, "--name", "shell"]) == 0
        return capsys.readouterr().out

    command = [sys.executable, "-m", "parallel_backend", "serve", "--name", "shell", "--world-size", "1"]
    env = os.environ | {"GLOO_TRIED": "1"}
    started = subprocess.run(
        [*command, "--device", "cpu", "--detach"], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert started.returncode == 0 and "process" in started.stdout
    with monkeypatch.context() as alike:  # else it would be restarted here, in the foreground
        alike.setenv("GLOO_TRIED", "1")
        said = run("serve", "--world-size", "1", "--device", "cpu", "--memory-budget-mib", "70", "--idle-seconds", "90")
    assert "memory budget 70 MiB a rank (was none), idle time 1.5 min (was 30)" in said and "runs already" in said
    assert "models leave after 1.5 min without work; memory budget: 70 MiB a rank" in run("status")
    assert "no models resident" in run("status")
    state = json.loads(run("status", "--json"))
    assert state["restarts"] == 0 and state["ranks"][0]["host"] == socket.gethostname()
    page = doctor()
    assert "ok     backend 'shell': 1 ranks, 0 jobs, 0 restarts" in page
    assert "note   Backend 'shell' was started with GLOO_TRIED=1; here: GLOO_TRIED unset." in page
    assert "has stopped" in run("stop")
    assert main(["stop", "--name", "shell"]) == 1
    assert "No backend 'shell' runs" in capsys.readouterr().err


def test_a_record_of_a_process_that_is_gone_is_no_backend(runtime_folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        record = files.BackendRecord("0", "g", other.pid, other.pid, "ipc:///none", 1, "cpu", [], start_ticks=1)
        files.write_record("stale", record)
        assert files.read_record("stale") is None  # a later process has its number
        files.write_record("stale", msgspec.structs.replace(record, start_ticks=files.start_ticks(other.pid)))
        assert files.read_record("stale") is not None
        other.kill()
    assert files.read_record("stale") is None and "stale" not in files.running_names()
    assert "is of a backend that is gone" in doctor()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(runtime_folder: Path) -> None:
    folder = files.runtime_dir("others")
    (folder / "backend.json").write_text("{}")
    os.chown(folder, 12345, 12345)
    with pytest.raises(StartError, match="belongs to another user"):
        Backend.attach("others")
    assert "others" not in files.running_names()
    assert f"{folder / 'backend.json'} can't be looked at: {folder} belongs to another user." in doctor()
    os.chown(folder, 0, 0)


def test_a_services_backend_is_found_from_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session sets, or another user's session below `su` has left set, doesn't move the place."""
    monkeypatch.setattr(files, "_SHARED", tmp_path)
    for name in ("PARALLEL_MMDIT_RUNTIME_DIR", "XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    record = files.BackendRecord("0", "g", os.getpid(), os.getpid(), "ipc:///none", 1, "cpu")
    files.write_record("service", record)
    own, others = tmp_path / "own", tmp_path / "others"
    for folder in (own, others):
        folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(others, 12345, 12345)
    for name, folder in (("XDG_RUNTIME_DIR", own), ("XDG_RUNTIME_DIR", others), ("TMPDIR", own)):
        monkeypatch.setenv(name, str(folder))
        assert files.read_record("service") == record and files.running_names() == ["service"]
    assert not list(own.iterdir()) and not list(others.iterdir())


def test_a_runtime_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PARALLEL_MMDIT_RUNTIME_DIR", str(tmp_path / "file" / "below"))
    said = f"{tmp_path}/file/below can't be used: Not a directory."
    for command in ("status", "stop"):
        assert main([command]) == 1
        assert f"{said} Set PARALLEL_MMDIT_RUNTIME_DIR to a folder of yours." in capsys.readouterr().err
    assert f"no backend can be started or found: {said}" in doctor() and not files.running_names()


def test_a_path_too_long_for_a_socket_is_named_by_its_bytes(runtime_folder: Path) -> None:
    with pytest.raises(StartError, match="longer than a socket's may be"):
        files.runtime_dir("模" * 30)


def test_last_words_are_kept_in_any_alphabet(runtime_folder: Path) -> None:
    files.note_last_words("words", 1, "模型 \udcff 😀 " * 2000)
    assert (files.last_words("words", 0.0) or "").startswith("rank 1: 模型 ? 😀 模型")


def test_a_backend_of_another_version_is_refused_with_the_remedy(backend2: Backend) -> None:
    record = msgspec.structs.replace(backend2.record, version="0.0.1")
    files.write_record("old", record)
    with pytest.raises(BackendInUseError, match=r"has version 0.0.1, this is .*can't be asked.*stop --name old"):
        Backend(2, "cpu", "old")
    (files.runtime_dir("old") / "backend.json").unlink()


def test_ranks_that_fall_in_a_row_are_started_at_growing_intervals() -> None:
    assert [pause_before(restarts, 0) for restarts in range(6)] == [0, 0, 1, 2, 4, 8]
    assert pause_before(100, 0) == 60 and pause_before(7, 6) == 0


@pytest.fixture
def lonely(large: Path, alone: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteModel]:
    """A model on one rank, whose client gives a silent one up soon."""
    monkeypatch.setattr(connection, "SILENT_SECONDS", 4.0)
    backend = Backend(1, "cpu", alone)
    yield backend.load_model(large, MeshSpec(), "float32")
    backend.close()


def test_a_lonely_rank_that_is_stopped_is_ended_by_its_client(lonely: RemoteModel) -> None:
    before, pid = sample(lonely), lonely.backend.status().ranks[0].pid
    with pytest.raises(BackendLostError, match=r"has not answered for \d s; its rank 0 .* was stopped and is ended"):
        sample(lonely, steps=5000, on_step=lambda step: os.kill(pid, signal.SIGSTOP) if step.index == 1 else None)
    assert torch.equal(sample(lonely), before)


def test_who_has_cancelled_is_told_that_where_the_ranks_never_answer(lonely: RemoteModel) -> None:
    before, pid = sample(lonely), lonely.backend.status().ranks[0].pid
    stopped = threading.Event()

    def stop(step: Step) -> None:
        if step.index == 1:
            os.kill(pid, signal.SIGSTOP)
            stopped.set()

    with pytest.raises(CancelledError):
        sample(lonely, steps=5000, on_step=stop, should_cancel=stopped.is_set)
    assert torch.equal(sample(lonely), before)


def test_ranks_that_are_being_started_anew_are_waited_for_not_doubled(alone: str) -> None:
    backend = Backend(1, "cpu", alone)
    os.kill(backend.record.pid, signal.SIGKILL)
    wait_until(lambda: files.restarting(alone))
    other = Backend(1, "cpu", alone)
    assert other.record.agent_pid == backend.record.agent_pid and other.generation != backend.generation
    # What is of another version doesn't understand a Stop, and is ended all the same.
    files.write_record(alone, msgspec.structs.replace(other.record, version="0.0.1"))
    with pytest.raises(BackendInUseError, match=rf"has version 0\.0\.1.*stop --name {alone}"):
        Backend(1, "cpu", alone)
    assert f"backend '{alone}' runs version 0.0.1" in doctor()
    assert main(["stop", "--name", alone]) == 0
    assert not files.is_alive(other.record.agent_pid) and not files.is_alive(other.record.pid)
    with pytest.raises(StartError, match=f"'{alone}' has ended"):
        other.status()
    other.stop()  # nothing to do, and nothing is started for it
    assert files.read_record(alone) is None


def test_a_backend_in_the_foreground_ends_with_its_process_and_between_restarts(runtime_folder: Path) -> None:
    command = [sys.executable, "-m", "parallel_backend", "serve", "--name", "front", "--world-size", "1"]
    for ended_by in ("a signal", "stop"):
        serve = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: files.read_record("front"))
        record = files.read_record("front")
        assert record is not None
        if ended_by == "a signal":
            serve.terminate()
        else:
            os.kill(record.pid, signal.SIGKILL)
            wait_until(lambda: files.restarting("front"))
            assert main(["stop", "--name", "front"]) == 0
        assert "ready: 1 ranks" in serve.communicate(timeout=60)[1]
        assert not files.is_alive(record.agent_pid) and not files.is_alive(record.pid)
        assert not files.restarting("front")


def test_a_setting_that_only_the_ranks_can_check_ends_the_start_with_its_reason(
    runtime_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--name", "taken", "--world-size", "1", "--device", "cpu", "--detach"]
        assert main([*arguments, "--metrics-port", port]) == 1
    assert f"Port {port} can't be listened on" in capfd.readouterr().err
    assert files.read_record("taken") is None and not files.restarting("taken")
    assert main([*arguments, "--keys", "nowhere"]) == 1
    assert "server.key_secret can't be read" in capfd.readouterr().err
    assert main([*arguments, "--hosts", "2", "--rendezvous", "10.0.0.1:29500"]) == 1
    assert "--detach is for one host" in capfd.readouterr().err


def write_distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """What pip leaves of an installed package for others to read."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_an_abort_at_a_ranks_exit_does_not_start_a_stopped_backend_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As threads of libraries end a process, now and then."""
    hook = "import atexit, os\nif 'RANK' in os.environ:\n    atexit.register(os.abort)\n"
    (tmp_path / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")])))
    backend = Backend(2, "cpu", "aborts")
    backend.stop()
    said = (files.runtime_dir("aborts") / "backend.log").read_text()
    assert said.count("ready: 2 ranks") == 1 and "stopped" in said and "failed (exitcode" not in said


def test_a_package_of_another_version_is_named_with_its_pin_before_torchrun(
    runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, packs = tmp_path / "site", tmp_path / "custom_nodes"
    write_distribution(site, "diffusers", "0.31.0")
    write_distribution(site, "pinning-pack", "1.0", "torch", "Diffusers==0.31.0", "diffusers==0.2; extra == 'old'")
    write_distribution(site, "content-pack", "1.0", "diffusers>=0.30", "no requirement at all")
    (packs / "old-pack").mkdir(parents=True)
    (packs / "old-pack" / "requirements.txt").write_text("--no-deps\ndiffusers<0.32  # newer ones break\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(requirements, "PACK", packs / "parallel-mmdit")
    said = (
        "parallel-mmdit needs diffusers>=0.36,<0.43, found 0.31.0 "
        "(pinned by custom_nodes/old-pack: diffusers<0.32, pinning-pack 1.0: Diffusers==0.31.0)"
    )
    with pytest.raises(StartError) as caught:
        Backend(1, "cpu", "pinned")
    assert caught.value.message == f"{said}." and "pip install 'diffusers>=0.36,<0.43'" in caught.value.remedy
    assert not (files.runtime_dir("pinned") / "backend.log").exists()
    wrong = [finding.what for finding in versions() if finding.verdict == "wrong"]
    assert wrong == [said]


@pytest.mark.parametrize(
    ("requirement", "found", "right"),
    [
        ("torch>=2.6", "2.6.0a0+df5bbc09d1.nv24.12", True),
        ("torch>=2.6", "2.5.1+cu124", False),
        ("diffusers>=0.36,<0.43", "0.36.0", True),
        ("diffusers>=0.36,<0.43", "0.43.0.dev0", False),
        ("diffusers>=0.36,<0.43", "of-our-own", True),
    ],
)
def test_versions_are_compared_by_release(
    requirement: str, found: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(tmp_path, requirement.partition(">")[0], found)
    monkeypatch.syspath_prepend(str(tmp_path))
    short = requirements.shortfall(requirement)
    assert short is None if right else short is not None and short.found == found


def test_a_package_that_is_not_there_is_named() -> None:
    short = requirements.shortfall("no-such-package-of-ours>=1")
    assert short is not None and short.what == "needs no-such-package-of-ours>=1, found none"
