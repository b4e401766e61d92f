"""Ranks that don't hear each other are named before "ready", and a job that stands still is named while it does."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from served import wait_until
from unet_inputs import inputs as unet_inputs

from parallel_backend import Backend, MeshSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.client import launcher
from parallel_backend.client.ending import end
from parallel_backend.config import BackendSpec
from parallel_backend.distributed.control import Control
from parallel_backend.distributed.links import prove_links
from parallel_backend.doctor.links import links
from parallel_backend.errors import RankError, StartError
from parallel_backend.rank import world
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rank.pulse import COMPILING_SECONDS, STILL_SECONDS, Pulse
from parallel_backend.rank.watch import CANCEL_SECONDS, Beat, Watch
from parallel_backend.rpc import runtime_dir as files
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Forward, Loaded, LoadModel
from parallel_backend.rpc.state import RankState
from parallel_backend.rpc.wire import tensor_meta
from parallel_backend.small_checkpoints.prompts import random_prompt

# Runs in each process as it starts: rank 1 never gets to its first message to the next rank.
ASLEEP_AT_THE_START = """
import os, time
if "RANK" in os.environ:
    import parallel_backend.rank.world as world
    world.MEET_SECONDS = 4.0
    if os.environ["RANK"] == "1":
        import torch.distributed
        torch.distributed.batch_isend_irecv = lambda ops: time.sleep(1e6)
"""


def by_start() -> None:
    Backend(2, "cpu", "unheard")


def by_doctor() -> None:
    (found,) = links()
    assert found.verdict == "wrong"
    raise StartError(found.what)


@pytest.mark.parametrize("ask", [by_start, by_doctor])
def test_ranks_that_don_t_hear_each_other_are_named_at_the_start_and_by_doctor(
    ask: Callable[[], None], runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ASLEEP_AT_THE_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartError, match=r"has waited 4 s for a message from each rank to the next") as caught:
        ask()
    for word in ("NCCL_P2P_DISABLE", "/dev/shm", "IOMMU", "NCCL_SOCKET_IFNAME"):
        assert word in caught.value.message
    assert files.read_record("unheard") is None and not list(runtime_folder.glob("doctor-links-*"))


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ARRIVE_SECONDS", 0.1)
    store = dist.HashStore()
    store.set("arrived/2", "1")
    with pytest.raises(StartError, match=r"Rank 0 has waited 0 s for rank 1, 3, which never came"):
        world._await_all(store, 0, 4)


def test_doctor_shows_what_sound_links_carry(runtime_folder: Path) -> None:
    figures = [finding.what for finding in links()]
    assert [re.sub(r"[\d.]+ ms, [\d.]+", "N", figure) for figure in figures] == [
        "2 ranks on cpu: an all-reduce over all ranks, 1 MiB: N GB/s",
        "2 ranks on cpu: a message from each rank to the next, 1 MiB: N GB/s",
    ]


def proof(plant: str) -> str:
    """What the proof says where a rank changes what it sends."""
    first = dist.get_rank() == 0
    with _planted(plant if first else ""):
        try:
            prove_links(torch.device("cpu"), lambda what: None)
        except StartError as error:
            return str(error)
    return ""


@contextmanager
def _planted(plant: str) -> Iterator[None]:
    real: Any = getattr(dist, plant or "all_reduce")

    def changed(sent: Any, **settings: Any) -> Any:
        (sent[0].tensor if isinstance(sent, list) else sent)[7] += 1
        return real(sent, **settings)

    if plant:
        setattr(dist, plant, changed)
    try:
        yield
    finally:
        if plant:
            setattr(dist, plant, real)


@pytest.mark.parametrize("world_size", [2, 3])
def test_links_that_carry_what_was_sent_are_proven(world_size: int, ranks: RankPool) -> None:
    assert ranks(world_size, proof, "") == [""] * world_size


def test_a_link_that_changes_a_number_is_named(ranks: RankPool) -> None:
    said = ranks(2, proof, "all_reduce")
    assert all("got 1 wrong numbers of 262144 from an all-reduce over all ranks" in text for text in said)
    sound, changed = ranks(2, proof, "batch_isend_irecv")
    assert sound == "" and "wrong numbers" in changed and "a message from each rank to the next" in changed


class Looked:
    """A watch of rank 0 of two that is asked by hand, at times of the test's own."""

    def __init__(self) -> None:
        states = [RankState(rank, f"host{rank}", "", 1, "cpu", "", 0, 0, 0) for rank in (0,)]
        self.collectives, self.cancelled = 0, False
        self.pulse = Pulse(torch.device("meta"), lambda: self.collectives)
        self.faults: list[RankError] = []
        self.watch = Watch(states, 0, self.pulse, self.faults.append)

    def at(self, seconds: float, other: Beat) -> list[str]:
        self.watch._look_at_job({1: other}, seconds)
        self.watch._look_for_a_cancel(seconds)
        return [fault.message for fault in self.faults]

    def begin(self, patience: float = STILL_SECONDS) -> None:
        self.pulse.begin("Sample", lambda: self.cancelled, patience)


def test_a_job_in_which_no_rank_moves_is_named_with_the_rank_that_is_behind() -> None:
    looked = Looked()
    looked.begin()
    looked.collectives = 18
    assert looked.at(0, Beat(moves=5, started=17)) == []
    assert looked.at(STILL_SECONDS, Beat(moves=5, started=17)) == []
    (said,) = looked.at(STILL_SECONDS + 1, Beat(moves=5, started=17))
    assert said == "no rank has moved for 40 s in Sample; rank 1 has started 17 collectives, others up to 18"
    assert "NCCL_P2P_DISABLE" in looked.faults[0].remedy


@pytest.mark.parametrize("what", ["a collective", "a step", "another rank", "the next job", "no job"])
def test_what_moves_is_not_named(what: str) -> None:
    looked = Looked()
    looked.begin()
    looked.at(0, Beat(moves=5))
    other = Beat(moves=6 if what == "another rank" else 5)
    if what == "a collective":
        looked.collectives += 1
    elif what == "a step":
        looked.pulse.beat()
    elif what == "the next job":
        looked.pulse.begin("Decode", lambda: False)
    elif what == "no job":
        looked.pulse.end()
    assert looked.at(STILL_SECONDS + 1, other) == []


def test_a_compiler_is_given_more_time() -> None:
    looked = Looked()
    looked.begin(COMPILING_SECONDS)
    looked.at(0, Beat())
    assert looked.at(STILL_SECONDS + 1, Beat()) == []
    assert "no rank has moved for 300 s" in looked.at(COMPILING_SECONDS + 1, Beat())[0]


def test_a_cancel_that_is_not_heard_is_named_and_one_that_is_heard_is_not() -> None:
    looked = Looked()
    looked.begin()
    looked.cancelled = True
    for second in range(int(CANCEL_SECONDS) + 1):
        looked.pulse.beat()  # it computes, but never asks
        assert looked.at(second, Beat()) == []
    assert looked.at(CANCEL_SECONDS + 1, Beat()) == ["Sample was cancelled and had not heard of it after 20 s"]
    heard = Looked()
    heard.begin()
    heard.cancelled = True
    heard.at(0, Beat())
    heard.pulse.end()
    assert heard.at(CANCEL_SECONDS + 1, Beat()) == []


def test_a_rank_on_a_cpu_moves_while_it_computes_and_not_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [0.0]
    monkeypatch.setattr("time.process_time", lambda: used[0])
    pulse = Pulse(torch.device("cpu"), lambda: 0)
    before = pulse.moves()
    used[0] = 0.9
    assert pulse.moves() == before
    used[0] = 2.0
    assert pulse.moves() > before


class FakeEvent:
    """The device comes past it when the test says so."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self, blocking: bool) -> None:
        self.recorded, self.passed = 0, threading.Event()
        FakeEvent.made.append(self)

    def record(self) -> None:
        self.recorded += 1
        self.passed.clear()

    def synchronize(self) -> None:
        self.passed.wait()


def test_a_rank_on_a_gpu_moves_when_its_device_comes_past_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has launched all blocks of an evaluation long before: only the device tells that it goes on."""
    FakeEvent.made.clear()
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    pulse = Pulse(torch.device("cuda"), lambda: 0)
    for _ in range(3 * len(FakeEvent.made)):  # more than may be under way
        pulse.beat()
    assert all(event.recorded == 1 for event in FakeEvent.made)
    before = pulse.moves()
    assert pulse.moves() == before
    FakeEvent.made[0].passed.set()
    wait_until(lambda: pulse.moves() == before + 1, 5)
    pulse.beat()
    assert FakeEvent.made[0].recorded == 2


@pytest.mark.parametrize("file", ["sd3.5-large", "unet-tiny"])
def test_a_job_moves_at_every_block_of_a_model(file: str, models: Path, unets: Path) -> None:
    """An evaluation may take minutes in which no rank sends anything."""
    path, beats = models / "diffusion_models" / f"{file}.safetensors", [0]

    def beat() -> None:
        beats[0] += 1

    engine, job = Engine(torch.device("cpu"), beat=beat), Job(Control(), lambda body, tensors: None, lambda: False)
    loaded, _ = engine.handle(RequestHeader(1, LoadModel(str(path), content_key(path), "float32", MeshSpec())), [], job)
    assert isinstance(loaded, Loaded)
    given = [torch.zeros(1, 16, 8, 8), torch.ones(1), *random_prompt(1, 7)]
    if file == "unet-tiny":
        given = list(unet_inputs("tiny", (1, 8, 8)))
    before = beats[0]
    body = Forward(loaded.model, 0, 1, 2, 3)
    engine.handle(RequestHeader(2, body, [tensor_meta(tensor) for tensor in given]), given, job)
    assert beats[0] - before >= 2


def test_torchrun_and_ranks_that_answer_nothing_are_killed(runtime_folder: Path) -> None:
    """Stopped processes hear no SIGTERM."""
    spec = BackendSpec("stuck", 1, "cpu")
    record = launcher.attach_or_start(spec)
    pids = [record.agent_pid, *files.children(record.agent_pid)]
    assert record.pid in pids
    for pid in pids:
        files.os.kill(pid, signal.SIGSTOP)
    assert end("stuck", 0.2)
    assert not any(files.is_alive(pid) for pid in pids)
