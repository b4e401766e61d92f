"""A real backend: persistence, several clients, cancel, bad input, and faults that it survives."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel
from parallel_backend.demo_checkpoints import random_prompt, small_config, write_mmdit
from parallel_backend.errors import (
    BackendError,
    BackendLostError,
    CancelledError,
    CheckpointError,
    ConfigError,
    InputError,
    StartError,
)
from parallel_backend.rpc import client
from parallel_backend.rpc import runtime_dir as files
from parallel_backend.rpc.messages import Decode, Failed, Forward, LoadModel, ReplyHeader, RequestHeader, Status
from parallel_backend.rpc.remote import Step
from parallel_backend.rpc.sent_tensors import Attachment
from parallel_backend.rpc.turns import QueuedJob, Turns
from parallel_backend.rpc.wire import pack, unpack
from parallel_backend.server import pause_before

POSITIVE, NEGATIVE = Conditioning(*random_prompt(1, 154)), Conditioning(*random_prompt(2, 77))
EMPTY = torch.zeros(1, 16, 16, 16)


@pytest.fixture(scope="module")
def large(models: Path) -> Path:
    return models / "diffusion_models" / "sd3.5-large.safetensors"


@pytest.fixture
def model(backend2: Backend, large: Path) -> RemoteModel:
    return backend2.load_model(large, MeshSpec(cfg=2), "float32")


@pytest.fixture(scope="module")
def expected(backend2: Backend, large: Path) -> Tensor:
    return sample(backend2.load_model(large, MeshSpec(cfg=2), "float32"))


def sample(model: RemoteModel, **settings: object) -> Tensor:
    return model.sample(EMPTY, POSITIVE, NEGATIVE, **{"seed": 1, "steps": 3} | settings)  # type: ignore[arg-type]


# -- persistence ------------------------------------------------------------------------------------------------


def test_the_second_load_reads_nothing_and_gives_the_same(backend2: Backend, large: Path, expected: Tensor) -> None:
    again = backend2.load_model(large, MeshSpec(cfg=2), "float32")
    assert again.loaded.bytes_read == [0, 0]
    assert torch.equal(sample(again), expected)


def test_another_client_finds_backend_and_model(backend2: Backend, large: Path, expected: Tensor) -> None:
    other = Backend.attach_or_start(2, "cpu", "test2")
    assert other.generation == backend2.generation
    model = other.load_model(large, MeshSpec(cfg=2), "float32")
    assert model.loaded.bytes_read == [0, 0]
    assert torch.equal(sample(model), expected)
    other.close()
    assert backend2.status().ranks


def test_a_backend_outlives_the_process_that_started_it(runtime_folder: Path) -> None:
    code = "from parallel_backend import Backend; print(Backend.attach_or_start(1, 'cpu', 'outlives').generation)"
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    backend = Backend.attach("outlives")
    assert backend.generation == started.stdout.strip()
    backend.stop()
    assert files.read_record("outlives") is None
    with pytest.raises(StartError, match="No backend 'outlives' runs"):
        Backend.attach("outlives")


ROOT = Path(__file__).parents[1]


def test_two_starts_at_once_make_one_backend(runtime_folder: Path) -> None:
    code = "from parallel_backend import Backend; print(Backend.attach_or_start(1, 'cpu', 'race').generation)"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    generations = {process.communicate(timeout=120)[0].strip() for process in both}
    assert generations == {Backend.attach("race").generation}
    Backend.attach("race").stop()


def test_an_idle_backend_ends_by_itself(runtime_folder: Path) -> None:
    backend = Backend.attach_or_start(1, "cpu", "idle", idle_seconds=1.0)
    assert files.wait_until_gone(backend.record.agent_pid, 30)
    assert files.read_record("idle") is None
    backend.close()


def test_other_ranks_than_those_that_run_are_refused_with_the_remedy(backend2: Backend) -> None:
    with pytest.raises(
        ConfigError, match=r"runs with 2 ranks on cpu; 3 on cpu were asked for.*python -m parallel_backend stop --name"
    ):
        Backend.attach_or_start(3, "cpu", "test2")


def test_a_start_that_fails_says_why_and_leaves_no_process(
    runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchlink0")
    with pytest.raises(StartError, match=r"(?s)ended while it started. Its log ends:.*nosuchlink0"):
        Backend.attach_or_start(1, "cpu", "nolink")
    marks = subprocess.run(["pgrep", "-f", "name nolink"], capture_output=True, text=True, check=False).stdout.split()
    assert not [pid for pid in marks if files.is_alive(int(pid))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_are_not_there_are_named(runtime_folder: Path) -> None:
    with pytest.raises(ConfigError, match="GPUs 0, 1 were asked for; torch sees 0 here"):
        Backend.attach_or_start(2, "cuda", "nogpu")


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


def doctor() -> str:
    command = [sys.executable, "-m", "parallel_backend", "doctor"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout


def test_the_command_line_tells_and_stops(runtime_folder: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "parallel_backend", *arguments, "--name", "shell"]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert "process" in run("serve", "--world-size", "1", "--device", "cpu", "--detach").stdout
    assert "runs already" in run("serve", "--world-size", "1", "--device", "cpu").stdout
    assert "no models resident" in run("status").stdout
    state = json.loads(run("status", "--json").stdout)
    assert state["restarts"] == 0 and state["ranks"][0]["host"] == socket.gethostname()
    assert "ok     backend 'shell': 1 ranks, 0 jobs, 0 restarts" in doctor()
    assert "has stopped" in run("stop").stdout
    stopped = run("stop")
    assert stopped.returncode == 1 and "No backend 'shell' runs" in stopped.stderr


# -- models and prompts -----------------------------------------------------------------------------------------


def test_the_least_recently_used_model_leaves_when_the_budget_is_passed(runtime_folder: Path, tmp_path: Path) -> None:
    paths = [write_mmdit(tmp_path / f"{i}.safetensors", small_config("sd3.5-large", 2), seed=i) for i in range(3)]
    one = 8 * 2**20
    backend = Backend.attach_or_start(1, "cpu", "budget", memory_budget=2 * one + 2**20)
    try:
        mesh = MeshSpec()
        assert backend.load_model(paths[0], mesh, "float32").loaded.resident_bytes[0] < one
        backend.load_model(paths[1], mesh, "float32")
        backend.load_model(paths[0], mesh, "float32")  # used again: 1 is now the oldest
        assert backend.load_model(paths[2], mesh, "float32").loaded.evicted == ["1.safetensors"]
        assert [m.name for m in backend.status().models] == ["0.safetensors", "2.safetensors"]
        big = write_mmdit(tmp_path / "big.safetensors", small_config("sd3.5-large", 4))
        with pytest.raises(ConfigError, match=r"big.safetensors needs \d+ MiB on a rank; the budget is 17 MiB"):
            backend.load_model(big, mesh, "float32")
        backend.unload()
        assert backend.status().models == []
    finally:
        backend.stop()


def test_a_model_that_left_is_loaded_again_by_itself(backend2: Backend, model: RemoteModel, expected: Tensor) -> None:
    backend2.unload([model.name])
    assert torch.equal(sample(model), expected)
    assert all(model.loaded.bytes_read)


def test_an_unchanged_prompt_is_not_sent_again_and_a_changed_one_is(model: RemoteModel, expected: Tensor) -> None:
    sample(model)
    changed = Conditioning(POSITIVE.context.clone(), POSITIVE.pooled)
    same = model.sample(EMPTY, changed, NEGATIVE, seed=1, steps=3)
    changed.context[0, 0, 0] += 5.0  # in place: the client must not take it for the tensor it sent
    other = model.sample(EMPTY, changed, NEGATIVE, seed=1, steps=3)
    assert torch.equal(same, expected) and not torch.equal(other, expected)
    sent = len(pack_size(model, POSITIVE))
    assert sent < POSITIVE.context.nbytes / 10


def pack_size(model: RemoteModel, conditioning: Conditioning) -> bytes:
    """The bytes that a request with this prompt puts on the wire now."""
    metas, sent, _ = model.backend._sent.prepare([Attachment(conditioning.context, True)])
    return b"".join(bytes(frame) for frame in pack(RequestHeader(1, Forward("m", 0, 0, 0, 0), metas), sent))


# -- progress and cancel ----------------------------------------------------------------------------------------


def test_every_step_is_reported_with_a_preview(model: RemoteModel, expected: Tensor) -> None:
    steps: list[Step] = []
    out = sample(model, preview=True, on_step=steps.append)
    assert [(s.index, s.total) for s in steps] == [(0, 3), (1, 3), (2, 3)]
    assert all(s.denoised is not None and s.denoised.shape == EMPTY.shape for s in steps)
    assert torch.equal(out, expected)


def test_cancel_ends_the_job_within_a_step_and_the_next_is_bit_equal(model: RemoteModel, expected: Tensor) -> None:
    seen: list[int] = []
    with pytest.raises(CancelledError):
        sample(model, steps=500, on_step=lambda s: seen.append(s.index), should_cancel=lambda: len(seen) >= 2)
    assert len(seen) < 100
    assert torch.equal(sample(model), expected)


def test_a_model_that_is_loading_is_given_up_within_a_tensor(
    backend2: Backend, model: RemoteModel, expected: Tensor, tmp_path: Path
) -> None:
    path = write_mmdit(tmp_path / "slow.safetensors", small_config("sd3.5-large", 7))
    begun: list[float] = []
    with pytest.raises(CancelledError):
        backend2.load_model(
            path,
            MeshSpec(cfg=2),
            "float32",
            on_event=lambda event, _: begun.append(time.monotonic()),
            should_cancel=lambda: bool(begun),
        )
    assert begun and "slow.safetensors" not in {m.name for m in backend2.status().models}
    assert torch.equal(sample(model), expected)
    assert len(backend2.load_model(path, MeshSpec(cfg=2), "float32").loaded.bytes_read) == 2
    backend2.unload()


def test_a_decode_is_given_up_between_blocks_and_the_next_one_is_whole(backend2: Backend, models: Path) -> None:
    vae = backend2.load_vae(models / "vae" / "sd3_vae.safetensors", "float32")
    latent = torch.randn(1, 16, 33, 32, generator=torch.Generator().manual_seed(1))
    before = vae.decode(latent)
    with pytest.raises(CancelledError):
        vae.decode(latent.repeat(16, 1, 1, 1), should_cancel=lambda: True)
    assert torch.equal(vae.decode(latent), before)


def test_clients_take_turns_whatever_each_has_asked_for() -> None:
    turns = Turns()
    jobs = [QueuedJob(client, number, []) for client, number in ((b"a", 1), (b"a", 2), (b"a", 3), (b"b", 1), (b"c", 1))]
    for job in jobs:
        turns.put(job)
    assert [turns.ahead_of(job) for job in jobs] == [0, 3, 4, 1, 2]
    order = [turns.get(1) for _ in jobs]
    assert [(job.client, job.number) for job in order if job] == [(b"a", 1), (b"b", 1), (b"c", 1), (b"a", 2), (b"a", 3)]
    with pytest.raises(queue.Empty):
        turns.get(0.01)
    turns.end()
    assert turns.get(1) is None


def test_a_request_whose_line_was_cut_ends_as_if_nothing_was_or_is_said_to_be_lost(
    backend2: Backend, model: RemoteModel, expected: Tensor, large: Path
) -> None:
    other, whole = Backend.attach("test2"), sample(model, steps=40)
    theirs = other.load_model(large, MeshSpec(cfg=2), "float32")

    def cut(step: Step) -> None:
        if step.index == 2:
            assert other._socket is not None
            other._socket.disconnect(other.record.address)
            time.sleep(0.3)
            other._socket.connect(other.record.address)

    try:
        assert torch.equal(sample(theirs, steps=40, on_step=cut), whole)
    except BackendLostError as error:
        assert "no longer knows the request" in error.message
    assert torch.equal(sample(theirs), expected)
    other.close()


def test_who_waits_when_a_backend_is_stopped_is_told(large: Path) -> None:
    backend, told = Backend.attach_or_start(1, "cpu", "leaving"), []
    first = backend.load_model(large, MeshSpec(), "float32")
    second = Backend.attach("leaving").load_model(large, MeshSpec(), "float32")

    def ask(model: RemoteModel) -> None:
        try:
            sample(model, steps=5000)
        except BackendError as error:
            told.append(error.code)

    threads = [threading.Thread(target=ask, args=(model,)) for model in (first, second)]
    other = Backend.attach("leaving")
    for thread in threads:
        thread.start()
    while not other.status().queued:
        time.sleep(0.05)
    other.stop()
    for thread in threads:
        thread.join(30)
    assert sorted(told) == ["backend_lost", "cancelled"]


def test_a_number_that_is_under_way_is_refused(backend2: Backend, raw_line: zmq.Socket[bytes], large: Path) -> None:
    frames = pack(RequestHeader(5, LoadModel(str(large), "another key", "float32", MeshSpec(cfg=2))), [])
    for _ in range(2):
        raw_line.send_multipart(frames)
    answers = [unpack(raw_line.recv_multipart(), ReplyHeader)[0].body for _ in range(2) if raw_line.poll(5000)]
    messages = sorted(body.message for body in answers if isinstance(body, Failed))
    assert "Request 5 is under way already" in messages[0] and "content has changed" in messages[1]


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
    os.chown(files.runtime_dir("others"), 12345, 12345)
    with pytest.raises(StartError, match="belongs to another user"):
        Backend.attach("others")


def test_a_backend_of_another_version_is_refused_with_the_remedy(backend2: Backend) -> None:
    record = msgspec.structs.replace(backend2.record, version="0.0.1")
    files.write_record("old", record)
    with pytest.raises(ConfigError, match=r"runs version 0.0.1.*stop --name old"):
        Backend.attach_or_start(2, "cpu", "old")
    (files.runtime_dir("old") / "backend.json").unlink()


def test_ranks_that_fall_in_a_row_are_started_at_growing_intervals() -> None:
    assert [pause_before(restarts, 0) for restarts in range(6)] == [0, 0, 1, 2, 4, 8]
    assert pause_before(100, 0) == 60 and pause_before(7, 6) == 0


def test_an_exception_in_the_callback_cancels_and_comes_back(model: RemoteModel, expected: Tensor) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(step: Step) -> None:
        raise Interrupt

    with pytest.raises(Interrupt):
        sample(model, steps=500, on_step=interrupt)
    assert torch.equal(sample(model), expected)


def test_two_clients_take_turns_and_one_cancel_leaves_the_other_alone(
    backend2: Backend, model: RemoteModel, large: Path, expected: Tensor
) -> None:
    other = Backend.attach("test2")
    others_model = other.load_model(large, MeshSpec(cfg=2), "float32")
    results: list[object] = []

    def cancelled() -> None:
        try:
            sample(others_model, steps=400, should_cancel=lambda: len(results) > 0)
        except CancelledError as error:
            results.append(error)

    thread = threading.Thread(target=cancelled)
    thread.start()
    time.sleep(0.3)
    waiting = threading.Thread(target=lambda: results.append(sample(model)))
    waiting.start()
    time.sleep(0.3)
    results.append("cancel now")
    thread.join(60)
    waiting.join(60)
    other.close()
    assert any(isinstance(r, CancelledError) for r in results)
    assert any(isinstance(r, Tensor) and torch.equal(r, expected) for r in results)


# -- bad input: a typed error, and the next prompt works ----------------------------------------------------------


def with_nan(conditioning: Conditioning) -> Conditioning:
    context = conditioning.context.clone()
    context[0, 3, 7] = float("nan")
    return Conditioning(context, conditioning.pooled)


BAD = {
    "channels": (InputError, "needs \\(batch, 16,", {"latent": torch.zeros(1, 4, 16, 16)}),
    "nan latent": (InputError, "latent holds NaN", {"latent": torch.full((1, 16, 16, 16), float("nan"))}),
    "size": (InputError, "divisible by 16 pixels", {"latent": torch.zeros(1, 16, 15, 16)}),
    "nan conditioning": (InputError, "conditioning holds NaN", {"positive": with_nan(POSITIVE)}),
    "width": (InputError, "the last of 4096", {"positive": Conditioning(torch.zeros(1, 77, 2048), POSITIVE.pooled)}),
    "pooled": (InputError, "the last of 2048", {"negative": Conditioning(NEGATIVE.context, torch.zeros(1, 1280))}),
    "sampler": (ConfigError, "'dpm_fast' is not known", {"sampler": "dpm_fast"}),
    "scheduler": (ConfigError, "'turbo' is not known", {"scheduler": "turbo"}),
    "steps": (ConfigError, "steps=0", {"steps": 0}),
    "uni_pc": (ConfigError, "single step", {"sampler": "uni_pc", "steps": 1}),
    "sigmas": (InputError, "don't fall", {"sigmas": torch.tensor([0.1, 0.5])}),
    "noise": (InputError, "Noise of", {"noise": torch.zeros(1, 16, 8, 8)}),
    "batch_index": (InputError, "batch_index", {"batch_index": [1, 2]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_value_and_the_next_prompt_works(name: str, model: RemoteModel, expected: Tensor) -> None:
    kind, words, change = BAD[name]
    settings = {"latent": EMPTY, "positive": POSITIVE, "negative": NEGATIVE, "seed": 1, "steps": 3} | change
    with pytest.raises(kind, match=words) as caught:
        model.sample(**settings)
    assert caught.value.remedy
    assert torch.equal(sample(model), expected)


def test_bad_files_and_meshes_leave_the_backend_as_it_was(
    backend2: Backend, model: RemoteModel, expected: Tensor, tmp_path: Path, large: Path
) -> None:
    half = tmp_path / "half.safetensors"
    half.write_bytes(large.read_bytes()[:1_000_000])
    with pytest.raises(CheckpointError, match="cut short"):
        backend2.load_model(half, MeshSpec(cfg=2))
    with pytest.raises(CheckpointError, match="is a VAE"):
        backend2.load_model(large.parents[1] / "vae" / "sd3_vae.safetensors", MeshSpec(cfg=2))
    with pytest.raises(ConfigError, match="= 3, but the backend has 2 ranks"):
        backend2.load_model(large, MeshSpec(tp=3))
    with pytest.raises(ConfigError, match="dtype 'int8' is not known"):
        backend2.load_model(large, MeshSpec(cfg=2), "int8")
    with pytest.raises(ConfigError, match="needs a GPU"):
        backend2.load_model(large, MeshSpec(cfg=2), "float16", kernel="flash")
    with pytest.raises(InputError, match="is not a model for this request"):
        backend2.request(Decode(model.name, 0), [Attachment(EMPTY)])
    assert torch.equal(sample(model), expected)


@pytest.fixture
def raw_line(backend2: Backend) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    line = context.socket(zmq.DEALER)
    line.connect(backend2.record.address)
    yield line
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "frames",
    [
        [b"nonsense"],
        [b""],
        [pack(RequestHeader(3, Status(), version="9.9.9"), [])[0]],
        [pack(RequestHeader(3, Status()), [])[0], b"a frame too many"],
    ],
    ids=["nonsense", "empty", "another version", "frames"],
)
def test_messages_of_another_kind_get_an_error_and_do_no_harm(
    frames: list[bytes], raw_line: zmq.Socket[bytes], model: RemoteModel, expected: Tensor
) -> None:
    raw_line.send_multipart(frames)
    assert raw_line.poll(5000)
    header, _ = unpack(raw_line.recv_multipart(), ReplyHeader)
    assert isinstance(header.body, Failed) and header.body.code == "protocol"
    if b"9.9.9" in frames[0]:
        assert "version 9.9.9" in header.body.message and "parallel_backend stop" in header.body.remedy
    assert torch.equal(sample(model), expected)


# -- faults: see test_faults.py ------------------------------------------------------------------------------------


def test_a_callback_may_take_longer_than_a_backend_may_be_silent(
    model: RemoteModel, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENT_SECONDS", 1.0)
    assert torch.equal(sample(model, on_step=lambda step: time.sleep(1.6)), expected)


def test_a_lonely_rank_that_is_stopped_is_ended_by_its_client(
    large: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENT_SECONDS", 4.0)
    backend = Backend.attach_or_start(1, "cpu", "lonely")
    try:
        model = backend.load_model(large, MeshSpec(), "float32")
        before, pid = sample(model), backend.status().ranks[0].pid
        with pytest.raises(
            BackendLostError, match=r"has not answered for \d s; its rank 0 .* was stopped and is ended"
        ):
            sample(model, steps=5000, on_step=lambda step: os.kill(pid, signal.SIGSTOP) if step.index == 1 else None)
        assert torch.equal(sample(model), before)
    finally:
        Backend.attach("lonely").stop()


def test_a_stopped_backend_is_started_again_by_the_next_request(large: Path, expected: Tensor) -> None:
    backend = Backend.attach_or_start(2, "cpu", "again")
    try:
        model = backend.load_model(large, MeshSpec(cfg=2), "float32")
        Backend.attach("again").stop()
        assert torch.equal(sample(model), expected)
    finally:
        Backend.attach("again").stop()
