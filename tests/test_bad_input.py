"""A real backend told wrong things: a typed error, and the next prompt works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq
from served import EMPTY, NEGATIVE, POSITIVE, sample
from torch import Tensor

from parallel_backend import Backend, Conditioning, MeshSpec, RemoteModel
from parallel_backend.client.sent_tensors import Attachment
from parallel_backend.errors import (
    CheckpointError,
    ConfigError,
    InputError,
)
from parallel_backend.rpc.headers import ReplyHeader, RequestHeader
from parallel_backend.rpc.messages import Decode, Failed, LoadModel, Status
from parallel_backend.rpc.wire import pack, unpack


def test_a_number_that_is_under_way_is_refused(backend2: Backend, raw_line: zmq.Socket[bytes], large: Path) -> None:
    frames = pack(RequestHeader(5, LoadModel(str(large), "another key", "float32", MeshSpec(cfg=2))), [])
    for _ in range(2):
        raw_line.send_multipart(frames)
    answers = [unpack(raw_line.recv_multipart(), ReplyHeader)[0].body for _ in range(2) if raw_line.poll(5000)]
    messages = sorted(body.message for body in answers if isinstance(body, Failed))
    assert "Request 5 is under way already" in messages[0] and "content has changed" in messages[1]


BAD = {
    "channels": (InputError, "needs \\(batch, 16,", {"latent": torch.zeros(1, 4, 16, 16)}),
    "size": (InputError, "at most 1024 pixels", {"latent": torch.zeros(1, 16, 16, 160)}),
    "width": (InputError, "the last of 4096", {"positive": Conditioning(torch.zeros(1, 77, 2048), POSITIVE.pooled)}),
    "pooled": (InputError, "the last of 2048", {"negative": Conditioning(NEGATIVE.context, torch.zeros(1, 1280))}),
    "sampler": (ConfigError, "'euler_cfg_pp' is not known", {"sampler": "euler_cfg_pp"}),
    "scheduler": (ConfigError, "'turbo' is not known", {"scheduler": "turbo"}),
    "steps": (ConfigError, "steps=0", {"steps": 0}),
    "uni_pc": (ConfigError, "single step", {"sampler": "uni_pc", "steps": 1}),
    "sigmas": (InputError, "can't be used", {"sigmas": torch.tensor([0.5, -0.1])}),
    "sigmas that rise": (
        InputError,
        "euler_ancestral can't go through sigmas .*which don't fall",
        {"sigmas": torch.tensor([0.1, 0.5]), "sampler": "euler_ancestral"},
    ),
    "sigmas up to noise alone": (InputError, "can't end at 1", {"sigmas": torch.tensor([0.5, 1.0])}),
    "sigma 0 first": (
        InputError,
        "can't start at sigma 0",
        {"sigmas": torch.tensor([0.0, 0.5]), "sampler": "dpm_adaptive"},
    ),
    "noise": (InputError, "Noise of", {"noise": torch.zeros(1, 16, 8, 8)}),
    "batch_index": (InputError, "batch_index", {"batch_index": [1, -2]}),
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
    with zmq.Context.instance().socket(zmq.DEALER) as line:
        line.linger = 0
        line.connect(backend2.record.address)
        yield line


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
        assert "version 9.9.9" in header.body.message and "Start the older of both again" in header.body.remedy
    assert torch.equal(sample(model), expected)
