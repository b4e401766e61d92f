"""The wire under messages that nobody would send: each is refused or answered, and the backend serves on.

The long run: PARALLEL_MMDIT_FUZZ_MESSAGES=1000000 pytest -o faulthandler_timeout=0 tests/test_fuzz.py
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel, SamplerSpec
from parallel_backend.client.shared_area import SharedArea
from parallel_backend.distributed.device_memory import anonymous_bytes
from parallel_backend.errors import ProtocolError
from parallel_backend.rpc.headers import ReplyHeader, RequestHeader
from parallel_backend.rpc.messages import Decode, Forward, LoadModel, Sample, Unload
from parallel_backend.rpc.messages import Prompt as WirePrompt
from parallel_backend.rpc.shared_memory import new_name
from parallel_backend.rpc.wire import pack, tensor_meta, unpack
from parallel_backend.small_checkpoints.prompts import random_prompt

MESSAGES = int(os.environ.get("PARALLEL_MMDIT_FUZZ_MESSAGES", "5000"))
FLAT_BYTES = 64 * 2**20

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=20))
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner))
NAMES = st.text(max_size=8) | st.builds(new_name)
PLACES = st.fixed_dictionaries({"name": NAMES, "start": st.integers()})
ROOMS = st.fixed_dictionaries({"name": NAMES, "start": st.integers(), "nbytes": st.integers()})
METAS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["float32", "uint8", "float16", "object", ""]),
        "shape": st.lists(st.integers(), max_size=9),
    },
    optional={"sent": st.booleans(), "key": st.none() | st.text(max_size=5), "shared": st.none() | PLACES},
)
TAGS = [
    "Hello",
    "LoadModel",
    "LoadVAE",
    "Sample",
    "Forward",
    "Decode",
    "Encode",
    "Unload",
    "Forget",
    "Status",
    "Cancel",
    "Ping",
    "Goodbye",
]
HEADERS = st.fixed_dictionaries(
    {"job": st.integers(), "body": st.fixed_dictionaries({"type": st.sampled_from([*TAGS, "Nothing"])}) | TREES},
    optional={
        "tensors": st.lists(METAS, max_size=3) | TREES,
        "room": ROOMS | TREES,
        "version": st.just("0.1.0") | st.text(max_size=5),
    },
)


@settings(max_examples=MESSAGES // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=HEADERS | TREES, frames=st.lists(st.binary(max_size=64), max_size=4))
def test_whatever_comes_is_read_or_refused(header: Any, frames: list[bytes]) -> None:
    try:
        first = msgspec.msgpack.encode(header)
    except (OverflowError, ValueError):  # not msgpack, so nothing that could come
        return
    try:
        decoded, tensors = unpack([first, *frames], RequestHeader)
    except ProtocolError as error:
        assert error.remedy
        return
    assert len(tensors) == len(decoded.tensors)


def base_frames(model: str, area: SharedArea) -> list[list[bytes]]:
    """Whole messages of each kind, to be damaged."""
    x, context, pooled = torch.zeros(1, 16, 16, 16), *random_prompt(1, 8)
    metas = [tensor_meta(t) for t in (x, context, pooled)]
    bodies = [
        Sample(model, SamplerSpec(steps=1), 0, WirePrompt(1, 2), batch_index=[0]),
        Forward(model, 0, 0, 1, 2),
        Decode(model, 0),
    ]
    whole = [pack(RequestHeader(1, body, metas), [x, context, pooled]) for body in bodies]
    whole += [pack(RequestHeader(1, LoadModel("/etc/passwd", "key", "float32", MeshSpec(cfg=2))), [])]
    whole += [pack(RequestHeader(1, Unload(["nothing"])), [])]
    (place,) = area.lay([x]) or []
    in_memory = [tensor_meta(x, sent=False, shared=place), *metas[1:]]
    whole += [pack(RequestHeader(1, bodies[1], in_memory, area.room(x.nbytes)), [context, pooled])]
    return [[bytes(frame) for frame in frames] for frames in whole]


def damaged(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """The message with bytes changed, cut, repeated or moved."""
    frames = [bytearray(frame) for frame in frames]  # type: ignore[misc]
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        frame = frames[0] if rng.random() < 0.7 else rng.choice(frames)
        if frame:
            frame[rng.randrange(len(frame))] = rng.randrange(256)  # type: ignore[index]
    kind = rng.randrange(6)
    if kind == 0:
        frames[-1] = frames[-1][: rng.randrange(len(frames[-1]) + 1)]
    elif kind == 1:
        frames.append(frames[-1])
    elif kind == 2:
        rng.shuffle(frames)
    return [bytes(frame) for frame in frames]


@pytest.fixture(scope="module")
def target(runtime_folder: Path) -> Iterator[Backend]:
    backend = Backend(2, "cpu", "fuzz")
    yield backend
    backend.stop()


def test_a_backend_under_fire_answers_each_message_and_stays_as_it_was(target: Backend, models: Path) -> None:
    model = target.load_model(models / "diffusion_models" / "sd3.5-large.safetensors", MeshSpec(cfg=2), "float32")
    expected = picture(model)
    area = SharedArea()
    rng, whole = random.Random(0), base_frames(model.name, area)
    fire(target, whole, rng, MESSAGES // 10)  # so that every path has run once
    pids = [rank.pid for rank in target.status().ranks]
    before, generation = [anonymous_bytes(pid) for pid in pids], target.generation
    for _ in range(10):
        fire(target, whole, rng, MESSAGES // 10)
    assert torch.equal(picture(model), expected)
    assert Backend.attach("fuzz").generation == generation
    grown = [anonymous_bytes(pid) - held for pid, held in zip(pids, before, strict=True)]
    assert max(grown) < FLAT_BYTES, f"grown by {grown} bytes"
    area.close()
    state = target.status()
    assert state.refused > MESSAGES // 10 and state.queued == 0


def fire(backend: Backend, whole: list[list[bytes]], rng: random.Random, messages: int) -> None:
    """Sends so many, damaged, from a line that is soon gone or stays, and waits for as many answers."""
    answered = 0
    with zmq.Context.instance().socket(zmq.DEALER) as line:
        line.linger = 0
        line.connect(backend.record.address)
        while answered < messages:
            part = min(100, messages - answered)
            for _ in range(part):
                line.send_multipart(damaged(rng.choice(whole), rng))
            for _ in range(part):
                assert line.poll(20_000), f"no answer to message {answered} of {messages}"
                unpack(line.recv_multipart(), ReplyHeader)
                answered += 1


def picture(model: RemoteModel) -> torch.Tensor:
    prompt = Conditioning(*random_prompt(1, 8))
    return model.sample(torch.zeros(1, 16, 16, 16), prompt, prompt, steps=2, seed=3)
