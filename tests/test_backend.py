"""A real backend at work: models and prompts that are held, progress, cancel, and clients side by side."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from served import EMPTY, NEGATIVE, POSITIVE, sample, wait_until
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel
from parallel_backend.client import connection
from parallel_backend.client.connection import Connection
from parallel_backend.client.remote import Step
from parallel_backend.client.sent_tensors import Attachment
from parallel_backend.errors import (
    BackendError,
    BackendLostError,
    CancelledError,
    ConfigError,
    MissingTensorsError,
)
from parallel_backend.rpc import runtime_dir as files
from parallel_backend.rpc.headers import RequestHeader
from parallel_backend.rpc.messages import Cancel, Forget, Forward
from parallel_backend.rpc.wire import pack
from parallel_backend.serving.turns import QueuedJob, Turns
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

# -- models and prompts -----------------------------------------------------------------------------------------


def test_the_least_recently_used_model_leaves_when_the_budget_is_passed(runtime_folder: Path, tmp_path: Path) -> None:
    paths = [write_mmdit(tmp_path / f"{i}.safetensors", small_config("sd3.5-large", 2), seed=i) for i in range(3)]
    one = 8 * 2**20
    backend = Backend(1, "cpu", "budget", memory_budget=2 * one + 2**20)
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


def test_a_prompt_that_others_free_between_two_tries_is_sent_whole(
    backend2: Backend, model: RemoteModel, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(model)
    keys = list(backend2._sent._copies)[-4:]  # of this prompt
    other, exchange, tries = Backend.attach("test2"), Connection._exchange, [0]

    def exchanged(line: Connection, *args: Any) -> Any:
        tries[0] += line is backend2
        try:
            return exchange(line, *args)
        except MissingTensorsError:
            other.request(Forget(keys))
            raise

    other.request(Forget(keys[:1]))
    monkeypatch.setattr(Connection, "_exchange", exchanged)
    assert torch.equal(sample(model), expected) and tries[0] == 2
    other.close()


def test_prompts_leave_with_the_connection_that_sent_them(backend2: Backend, model: RemoteModel) -> None:
    sample(model)
    kept = backend2.status().cached_bytes
    prompt = NEGATIVE.context.nbytes + NEGATIVE.pooled.nbytes
    others = [Backend.attach("test2") for _ in range(2)]
    for other in others:
        RemoteModel(other, model.load, model.loaded).sample(EMPTY, NEGATIVE, seed=1, steps=1)
    assert backend2.status().cached_bytes == kept + 2 * prompt
    others[0].close()
    wait_until(lambda: backend2.status().cached_bytes == kept + prompt)
    others[1].close()
    wait_until(lambda: backend2.status().cached_bytes == kept)


def test_every_step_is_reported_with_a_preview(model: RemoteModel, expected: Tensor) -> None:
    steps: list[Step] = []
    out = sample(model, preview="all", on_step=steps.append)
    assert [(s.index, s.total) for s in steps] == [(0, 3), (1, 3), (2, 3)]
    assert all(s.denoised is not None and s.denoised.shape == EMPTY.shape for s in steps)
    assert torch.equal(out, expected)


def test_cancel_ends_the_job_within_a_step_and_the_next_is_bit_equal(model: RemoteModel, expected: Tensor) -> None:
    seen: list[int] = []
    with pytest.raises(CancelledError):
        sample(model, steps=500, on_step=lambda s: seen.append(s.index), should_cancel=lambda: len(seen) >= 2)
    assert len(seen) < 100
    assert torch.equal(sample(model), expected)


def test_an_interrupt_in_the_client_ends_its_job_too(backend2: Backend, model: RemoteModel, expected: Tensor) -> None:
    steps: list[Step] = []

    def interrupted() -> bool:
        if steps:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        sample(model, steps=5000, on_step=steps.append, should_cancel=interrupted)
    wait_until(lambda: not backend2.status().running)
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


def test_a_job_that_the_backend_has_given_up_by_itself_is_lost_not_cancelled(
    model: RemoteModel, expected: Tensor
) -> None:
    """As it does with those of a client to which nothing can be sent, and which is back before its job has ended."""
    other = Backend.attach("test2")
    theirs = other.load_model(model.load.path, MeshSpec(cfg=2), "float32")

    def give_up(step: Step) -> None:
        if step.index == 2:
            other._send(Cancel(other._jobs))

    with pytest.raises(BackendLostError, match="the connection was cut meanwhile"):
        sample(theirs, steps=40, on_step=give_up)
    assert torch.equal(sample(theirs), expected)
    other.close()


def test_who_waits_when_a_backend_is_stopped_is_told(large: Path) -> None:
    backend, told = Backend(1, "cpu", "leaving"), []
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
    assert told == ["backend_lost"] * 2, "nobody has cancelled"
    first.leave()  # of a backend that has ended: nothing, and none is started for it
    assert not first.is_held()
    assert files.living_names().count("leaving") == 0


def test_a_model_leaves_when_asked_but_not_by_a_callback_of_its_own_job(
    backend2: Backend, model: RemoteModel, expected: Tensor
) -> None:
    def resident() -> bool:
        listed = model.name in {held.model for held in backend2.status().models}
        assert model.is_held() is listed
        return listed

    def on_step(_: Step) -> None:
        model.leave()
        assert model.is_held()  # not asked, since a request is under way

    assert torch.equal(sample(model, on_step=on_step), expected) and resident()
    model.leave()
    assert not resident()
    assert torch.equal(sample(model), expected) and resident()


def test_dtype_auto_is_float32_on_cpu_ranks(backend2: Backend, large: Path) -> None:
    assert backend2.load_model(large, MeshSpec(cfg=2)).load.dtype == "float32"
    assert backend2.load_vae(large.parents[1] / "vae" / "sd3_vae.safetensors").load.dtype == "float32"


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


def test_a_callback_may_take_longer_than_a_backend_may_be_silent(
    model: RemoteModel, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENT_SECONDS", 1.0)
    assert torch.equal(sample(model, on_step=lambda step: time.sleep(1.6)), expected)
