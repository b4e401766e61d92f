"""Messages and frames: what goes out comes back, and what doesn't fit is refused without harm."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from parallel_backend import SamplerSpec
from parallel_backend.client.sent_tensors import REMEMBERED, Attachment, SentTensors
from parallel_backend.errors import ConfigError, ProtocolError
from parallel_backend.rank import kept_tensors
from parallel_backend.rank.kept_tensors import KeptTensors
from parallel_backend.rpc.headers import RequestHeader, TensorMeta
from parallel_backend.rpc.messages import Forward, Prompt, Sample, Status
from parallel_backend.rpc.shared_memory import new_name
from parallel_backend.rpc.wire import pack, tensor_meta, unpack
from parallel_backend.serving.sent_keys import MOST_CLIENTS, MOST_KEYS, SentKeys

TENSORS = [
    torch.randn(2, 3, 4),
    torch.randn(5).bfloat16(),
    torch.randn(2, 2).half(),
    torch.tensor(3.5),
    torch.zeros(0, 4),
    torch.arange(6),
    torch.randn(4, 6).t(),
]


def test_tensors_come_back_bit_for_bit() -> None:
    body = Sample("m", SamplerSpec(seed=2**64 - 1), 0, Prompt(1, 2), mask=3, batch_index=[1, 2], preview="all")
    header = RequestHeader(7, body, [tensor_meta(t) for t in TENSORS])
    decoded, tensors = unpack([bytes(f) for f in pack(header, TENSORS)], RequestHeader)
    assert decoded == header
    for sent, received in zip(TENSORS, tensors, strict=True):
        assert received is not None and received.dtype == sent.dtype and torch.equal(received, sent)


def test_a_tensor_named_by_key_has_no_frame() -> None:
    metas = [tensor_meta(TENSORS[0]), tensor_meta(TENSORS[1], sent=False, key="abc")]
    _, tensors = unpack(pack(RequestHeader(1, Forward("m", 0, 1, 1, 1), metas), TENSORS[:1]), RequestHeader)
    assert tensors[0] is not None and tensors[1] is None


def test_an_unchanged_tensor_is_sent_once_and_a_changed_one_again() -> None:
    kept = SentTensors()
    x = torch.zeros(2, 4)

    def frames(*tensors: torch.Tensor) -> int:
        _, sent, keys = kept.prepare([Attachment(t, kept=True) for t in tensors])
        kept.note_sent(keys)
        return len(sent)

    assert [frames(x, x), frames(x), frames(x.clone())] == [1, 0, 0]
    assert [frames(x.view(4, 2)), frames(x.half()), frames(x + 1)] == [1, 1, 1]
    x[0, 0] = 5.0
    assert frames(x) == 1
    kept.forget()
    assert frames(x) == 1


PLACE = {"name": new_name(), "start": 0}
IN_MEMORY = {"dtype": "float32", "shape": [1], "sent": False, "shared": PLACE}
ROOM = {"name": new_name(), "start": 0, "nbytes": 64}


def header(**changes: object) -> bytes:
    plain = msgspec.to_builtins(RequestHeader(1, Status()))
    return msgspec.msgpack.encode(plain | changes)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "empty message"),
        ([b""], "no readable header"),
        ([b"\xc1garbage"], "no readable header"),
        ([header(version="0.0.1")], "version 0.0.1 came; this backend is version"),
        ([header(surprise=1)], "surprise"),
        ([header(body={"type": "Format"})], "Invalid value 'Format'"),
        ([header(body={"type": "Cancel", "job": "x"})], "Expected `int`"),
        ([header(body={"type": "Status", "more": 1})], "more"),
        ([header(), b"extra"], "names 0 tensors and carries 1 frames"),
        ([header(tensors=[{"dtype": "float32", "shape": [4]}])], "names 1 tensors and carries 0 frames"),
        ([header(tensors=[{"dtype": "float32", "shape": [4]}]), b"\0" * 15], r"15 bytes where float32 \[4\] needs 16"),
        ([header(tensors=[{"dtype": "object", "shape": [1]}]), b"\0" * 8], "tensor of 'object'"),
        (
            [header(tensors=[{"dtype": "float32", "shape": [-1, -4]}]), b"\0" * 16],
            r"'float32' \[-1, -4\] can't be read",
        ),
        ([header(tensors=[{"dtype": "float32", "shape": [2**30, 2**30]}]), b""], "needs"),
        ([header(tensors=[{"dtype": "float32", "shape": [1], "shared": PLACE}]), b"\0" * 4], "is sent or kept as well"),
        ([header(tensors=[IN_MEMORY | {"key": "k"}])], "is sent or kept as well"),
        ([header(room=ROOM | {"name": "../../etc/passwd"})], "passwd' is no file of a client's"),
        ([header(room=ROOM | {"start": -64})], "from byte -64 on"),
        ([header(room=ROOM | {"start": 3})], "from byte 3 on"),
        ([header(room=ROOM | {"nbytes": 2**40})], f"{2**40} bytes of room"),
        ([header(room=ROOM | {"more": 1})], "more"),
    ],
)
def test_messages_that_lie_or_are_of_another_kind_are_refused(frames: list[bytes], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        unpack(frames, RequestHeader)


def test_settings_are_checked_as_they_are_read() -> None:
    body = msgspec.to_builtins(Sample("m", SamplerSpec(), 0, Prompt(1, 2)))
    body["spec"]["steps"] = 0
    with pytest.raises(ConfigError, match="steps=0"):
        unpack([header(body=body)], RequestHeader)


def test_a_dtype_that_does_not_travel_is_named() -> None:
    with pytest.raises(ProtocolError, match=r"torch\.complex64"):
        tensor_meta(torch.zeros(1, dtype=torch.complex64))
    assert TensorMeta("float32", [1]).sent


def test_tensors_of_connections_that_never_said_goodbye_are_freed_in_the_end() -> None:
    sent = SentKeys()
    for number in range(MOST_CLIENTS):
        assert sent.note(b"%d" % number, [f"{number}-1", f"{number}-2"]) == []
    assert sent.forget(b"5") == ["5-1", "5-2"] and sent.forget(b"5") == []
    sent.note(b"0", [])  # still there
    sent.note(b"new", ["n"])
    assert sent.note(b"newer", ["m"]) == ["1-1", "1-2"]
    sent.note(b"newer", map(str, range(10 * MOST_KEYS)))
    assert len(sent.forget(b"newer")) == MOST_KEYS


def test_tensors_that_a_backend_misses_all_travel_again() -> None:
    """Those that it still had may be gone before the second try comes to its turn: another client has freed all."""
    sent, prompt = SentTensors(), [Attachment(torch.full((3,), float(i)), kept=True) for i in range(2)]
    _, _, keys = sent.prepare(prompt)
    sent.note_sent(keys)
    assert sent.prepare(prompt)[1] == []
    sent.forget()
    metas, travelling, _ = sent.prepare(prompt)
    assert len(travelling) == 2 and all(meta.sent for meta in metas)


def test_a_lasting_tensor_is_read_again_only_when_it_was_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of 900 MB is named at every evaluation."""
    sent, tensor = SentTensors(), torch.zeros(3)
    read: list[Tensor] = []
    by_value = SentTensors._key_by_value

    def noted(self: SentTensors, tensor: Tensor, before: Any) -> str:
        read.append(tensor)
        return by_value(self, tensor, before)

    monkeypatch.setattr(SentTensors, "_key_by_value", noted)

    def travels(tensor: Tensor) -> bool:
        _, travelling, keys = sent.prepare([Attachment(tensor, kept=True, lasting=True)])
        sent.note_sent(keys)
        return bool(travelling)

    assert travels(tensor) and not travels(tensor) and len(read) == 1
    tensor[0] = 1.0
    assert travels(tensor) and not travels(tensor) and len(read) == 2
    with torch.inference_mode():  # of which torch doesn't tell
        untold = torch.full((3,), 2.0)
    assert travels(untold) and not travels(untold) and len(read) == 4


def test_what_one_request_names_stays_for_the_next_however_much_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others, as much as there is room for; a request that names none leaves all as it is."""
    monkeypatch.setattr(kept_tensors, "MOST_BYTES", 100)
    sent, kept = SentTensors(), KeptTensors()

    def travelling(*values: int) -> int:
        attachments = [Attachment(torch.full((5,), float(value)), kept=True) for value in values]
        metas, tensors, keys = sent.prepare(attachments)
        rest = iter(tensors)
        found = kept.complete(metas, [next(rest) if meta.sent else None for meta in metas])
        assert [tensor[0].item() for tensor in found] == list(values)
        sent.note_sent(keys)
        return len(tensors)

    job = range(2 * REMEMBERED)
    assert travelling(-1) == 1 and travelling(-1) == 0
    assert travelling(*job) == len(job)
    kept.complete([], [])
    assert travelling(*job) == 0 and len(kept) == len(job)
    assert travelling(-1) == 1 and kept.nbytes == 100
