"""One evaluation on one machine: its latent and its output lie in memory, its prompt stays with the ranks, nobody else is read or written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from fake_cuda.device import DEVICE, fake_cuda, on_cuda
from fake_cuda.watch import HostSyncError, Watch
from served import POSITIVE, sample, wait_until
from torch import Tensor

from parallel_backend import Backend, MeshSpec, RemoteModel, SamplerSpec
from parallel_backend.checkpoint_files.content import content_key
from parallel_backend.client import connection
from parallel_backend.client.remote import Step
from parallel_backend.client.shared_area import SharedArea
from parallel_backend.distributed.control import Control
from parallel_backend.errors import CancelledError, ProtocolError
from parallel_backend.models.prediction import Predictor
from parallel_backend.rank.engine import Engine
from parallel_backend.rank.jobs import Job
from parallel_backend.rank.shared_tensors import laid
from parallel_backend.rpc import runtime_dir, shared_memory
from parallel_backend.rpc.headers import ReplyHeader, RequestHeader, SharedPlace, SharedRoom, TensorMeta
from parallel_backend.rpc.host_copies import on_host, onto_device
from parallel_backend.rpc.messages import (
    Cancel,
    Failed,
    Forward,
    LoadModel,
    Prompt,
    Result,
    Sample,
)
from parallel_backend.rpc.shared_memory import new_name
from parallel_backend.rpc.wire import pack, tensor_meta, unpack

X = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([900.0, 200.0])
PROMPT = [POSITIVE.context, POSITIVE.pooled]


def evaluated(model: RemoteModel, x: Tensor = X, **more: Any) -> Tensor:
    return model.forward(x, TIMES[: len(x)], POSITIVE.context, POSITIVE.pooled, **more)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each request: the bytes of its frames, and of those of its last reply."""
    seen: list[tuple[int, int]] = []
    packing, unpacking = connection.pack, connection.unpack

    def packed(header: Any, tensors: Any) -> Any:
        frames = packing(header, tensors)
        if isinstance(header.body, Forward):
            seen.append((sum(map(len, frames)), 0))
        return frames

    def unpacked(frames: Any, kind: Any) -> Any:
        found = unpacking(frames, kind)
        if seen and isinstance(found[0].body, Result):
            seen[-1] = (seen[-1][0], sum(map(len, frames)))
        return found

    monkeypatch.setattr(connection, "pack", packed)
    monkeypatch.setattr(connection, "unpack", unpacked)
    return seen


def test_by_memory_and_by_the_socket_comes_the_same(model: RemoteModel, sizes: list[tuple[int, int]]) -> None:
    evaluated(model)
    by_memory = evaluated(model)
    assert max(sizes[-1]) < 1024
    area = model.backend._sent.area
    assert area is not None
    model.backend._sent.area = None
    try:
        assert torch.equal(evaluated(model), by_memory)
        assert min(sizes[-1]) > X.nbytes
    finally:
        model.backend._sent.area = area


@pytest.mark.parametrize("rows", [1, 2])
def test_an_output_is_the_callers_own(rows: int, model: RemoteModel) -> None:
    """Memory is written anew by each request; rows that divide among the ranks, and one that doesn't."""
    first = evaluated(model, X[:rows])
    kept = first.clone()
    second = evaluated(model, -2 * X[:rows])
    assert torch.equal(first, kept) and not torch.equal(first, second)
    first.zero_()
    assert torch.equal(evaluated(model, X[:rows]), kept)


def test_sizes_may_grow_and_shrink(model: RemoteModel) -> None:
    small, large = X[:1, :, :8, :8].contiguous(), X.repeat(2, 1, 1, 1)[:, :, :, :12]
    expected = [evaluated(model, x) for x in (small, X)]
    assert evaluated(model, X).shape == X.shape
    out = model.forward(large, TIMES.repeat(2), POSITIVE.context, POSITIVE.pooled)
    assert out.shape == large.shape and torch.equal(out[:2], out[2:])
    for x, known in zip((small, X), expected, strict=True):
        assert torch.equal(evaluated(model, x), known)


def test_a_job_that_is_given_up_takes_its_memory_with_it(model: RemoteModel) -> None:
    """Else it might write its output, late, over the next request's latent."""
    expected, area = evaluated(model), model.backend._sent.area
    assert area is not None
    before = area._path

    def interrupted() -> bool:
        raise KeyboardInterrupt

    big = torch.zeros(2, 16, 64, 64)
    with pytest.raises(KeyboardInterrupt):
        model.forward(big, TIMES, POSITIVE.context, POSITIVE.pooled, should_cancel=interrupted)
    assert before is not None and not before.exists()
    assert torch.equal(evaluated(model), expected)
    assert area._path is not None and area._path.name != before.name


def test_where_ranks_do_not_see_the_memory_all_goes_by_the_socket(
    model: RemoteModel, sizes: list[tuple[int, int]]
) -> None:
    expected, line = evaluated(model), model.backend
    area = line._sent.area
    assert area is not None and area._path is not None
    area._path = area._path.with_name(new_name())
    try:
        assert torch.equal(evaluated(model), expected)
        assert line._sent.area is None and min(sizes[-1]) > X.nbytes
    finally:
        area.close()
        line._sent.area = SharedArea()
    assert torch.equal(evaluated(model), expected)


# -- what others may say -------------------------------------------------------------------------------------------


@pytest.fixture
def raw_line(backend2: Backend) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context.instance().socket(zmq.DEALER) as line:
        line.linger = 0
        line.connect(backend2.record.address)
        yield line


@pytest.fixture
def area() -> Iterator[SharedArea]:
    area = SharedArea()
    yield area
    area.close()


def asked(line: zmq.Socket[bytes], model: RemoteModel, room: SharedRoom) -> tuple[ReplyHeader, list[Tensor | None]]:
    tensors = [X, TIMES, POSITIVE.context, POSITIVE.pooled]
    header = RequestHeader(9, Forward(model.name, 0, 1, 2, 3), [tensor_meta(t) for t in tensors], room)
    line.send_multipart(pack(header, tensors))
    assert line.poll(20_000)
    return unpack(line.recv_multipart(), ReplyHeader)


def test_a_room_is_written_where_it_is_and_nowhere_else(
    model: RemoteModel, raw_line: zmq.Socket[bytes], area: SharedArea
) -> None:
    expected = evaluated(model)
    area.lay([torch.zeros(64)])
    room = area.room(X.nbytes)
    assert room is not None and area._path is not None
    header, tensors = asked(raw_line, model, room)
    assert tensors == [None] and torch.equal(area.read(header.tensors[0]), expected)
    assert not any(area._path.read_bytes()[:256])

    short = SharedRoom(room.name, room.start + X.nbytes, X.nbytes)
    header, tensors = asked(raw_line, model, short)
    assert isinstance(header.body, Failed) and "ends at byte" in header.body.message and not tensors

    for elsewhere in (SharedRoom(new_name(), 0, X.nbytes), SharedRoom(room.name, room.start, X.nbytes - 1)):
        _, (by_socket,) = asked(raw_line, model, elsewhere)
        assert by_socket is not None and torch.equal(by_socket, expected)
    assert torch.equal(evaluated(model), expected)


def test_links_and_what_is_no_file_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, secret = tmp_path / "memory", tmp_path / "secret"
    memory.mkdir()
    secret.write_bytes(bytes(64))
    monkeypatch.setattr(shared_memory, "_FOLDERS", (memory,))
    tensors = [torch.ones(4)]
    for make in (lambda path: path.symlink_to(secret), lambda path: path.mkdir(), os.mkfifo):
        name = new_name()
        make(memory / name)
        assert laid(SharedRoom(name, 0, 64), tensors) is tensors
    assert not any(secret.read_bytes())
    with pytest.raises(ProtocolError, match="no file of a client's"):
        laid(SharedRoom("../secret", 0, 64), tensors)


def test_several_tensors_lie_one_after_the_other(area: SharedArea) -> None:
    tensors = [torch.randn(5), torch.zeros(0, 3), torch.arange(7).half()]
    area.lay([torch.zeros(1)])
    metas: Any = laid(area.room(192), tensors)
    assert all(torch.equal(area.read(meta), tensor) for meta, tensor in zip(metas, tensors, strict=True))
    assert laid(area.room(64), tensors) is tensors and laid(None, tensors) is tensors
    assert list(laid(area.room(64), [])) == []


def test_a_client_reads_its_own_room_alone(area: SharedArea) -> None:
    area.lay([torch.zeros(16)])
    room = area.room(64)
    assert room is not None and room.start == 64
    right = TensorMeta("float32", [16], sent=False, shared=SharedPlace(room.name, room.start))
    assert area.read(right).shape == (16,)
    lies: list[Callable[[], TensorMeta]] = [
        lambda: TensorMeta("float32", [16], sent=False, shared=SharedPlace(room.name, 0)),
        lambda: TensorMeta("float32", [17], sent=False, shared=SharedPlace(room.name, room.start)),
        lambda: TensorMeta("float32", [2**30, 2**30], sent=False, shared=SharedPlace(room.name, room.start)),
        lambda: TensorMeta("float32", [16], sent=False, shared=SharedPlace(new_name(), room.start)),
        lambda: TensorMeta("float32", [16], sent=False),
    ]
    for lie in lies:
        with pytest.raises(ProtocolError, match="no room was made"):
            area.read(lie())
    area.close()
    with pytest.raises(ProtocolError, match="no room was made"):
        area.read(right)


def test_a_result_without_room_goes_by_the_socket_and_is_told_of_once(
    area: SharedArea, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    area.lay([torch.zeros(16)])

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level("WARNING", logger="parallel_backend"):
        assert [area.room(2**20) for _ in range(3)] == [None] * 3
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["no room for a result"]


# -- jobs and prompts ----------------------------------------------------------------------------------------------


def test_a_job_that_is_cancelled_while_it_waits_is_never_handed_on(
    backend2: Backend, model: RemoteModel, raw_line: zmq.Socket[bytes], expected: Tensor
) -> None:
    log = runtime_dir.runtime_dir("test2") / "rank1.log"

    def begun() -> int:
        return log.read_text().count("Sample begins")

    before, failed, other = begun(), backend2.status().jobs_failed, Backend.attach("test2")
    tensors = [torch.zeros(1, 16, 16, 16), *PROMPT]
    waiting = RequestHeader(77, Sample(model.name, SamplerSpec(), 0, Prompt(1, 2)), [tensor_meta(t) for t in tensors])
    steps = [0]  # of the running job, before another one has come and gone; then those after

    def another_comes_and_goes(step: Step) -> None:
        steps[-1] += 1
        if step.index == 0:
            raw_line.send_multipart(pack(waiting, tensors))
            raw_line.send_multipart(pack(RequestHeader(78, Cancel(77)), []))
            wait_until(lambda: other.status().queued == 1)
            steps.append(0)

    # More steps than are made while a busy machine looks at its queue.
    with pytest.raises(CancelledError):
        sample(
            model, steps=5000, on_step=another_comes_and_goes, should_cancel=lambda: steps[-1] > 3 and len(steps) > 1
        )
    assert torch.equal(sample(model), expected)
    answers = {}
    while len(answers) < 2:
        assert raw_line.poll(20_000)
        header, _ = unpack(raw_line.recv_multipart(), ReplyHeader)
        answers[header.job] = header.body
    assert isinstance(answers[77], Failed) and answers[77].code == CancelledError.code
    assert begun() == before + 2 and backend2.status().jobs_failed == failed + 2
    other.close()


def test_a_prompt_that_is_kept_is_put_on_the_device_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    checked = Predictor._checked_prompt

    def counted(predictor: Predictor, *args: Any) -> Any:
        made.append(1)
        return checked(predictor, *args)

    monkeypatch.setattr(Predictor, "_checked_prompt", counted)
    engine, job = Engine(torch.device("cpu")), Job(Control(), lambda body, tensors: None, lambda: False)
    load = LoadModel(str(large), content_key(large), "float32", MeshSpec())
    loaded: Any = engine.handle(RequestHeader(1, load), [], job)[0]
    body = Forward(loaded.model, 0, 1, 2, 3)
    outputs = []
    for sent in (True, False, False):
        metas = [tensor_meta(X), tensor_meta(TIMES)]
        metas += [tensor_meta(t, sent=sent, key=f"k{i}") for i, t in enumerate(PROMPT)]
        tensors = [X, TIMES, *(PROMPT if sent else [None, None])]
        outputs += engine.handle(RequestHeader(2, body, metas), tensors, job)[1]
    assert len(made) == 1 and all(torch.equal(out, outputs[0]) for out in outputs)


# -- to a GPU and back ---------------------------------------------------------------------------------------------


def test_copies_to_a_gpu_are_queued_and_those_from_it_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    with fake_cuda(), Watch():
        monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda stream: waits.append(1))
        assert onto_device(torch.zeros(3, 2), DEVICE).device == DEVICE
        back = on_host([on_cuda(2, 3), torch.ones(4), on_cuda(5).t()])
        with pytest.raises(HostSyncError):
            torch.zeros(3, 2).to(DEVICE)
    assert [x.shape for x in back] == [(2, 3), (4,), (5,)] and {x.device.type for x in back} == {"cpu"}
    assert waits == [1] and torch.equal(back[1], torch.ones(4))


def test_on_cpus_nothing_is_copied() -> None:
    x = torch.ones(3)
    assert on_host([x])[0] is x and onto_device(x, torch.device("cpu")) is x
