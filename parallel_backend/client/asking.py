"""One question to a running backend, of this version or another, outside of any connection; and this process's name there."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec
import zmq

from ..rpc import runtime_dir as files
from ..rpc.headers import RequestHeader
from ..rpc.messages import Hello, Request
from ..rpc.runtime_dir import BackendRecord
from ..rpc.wire import pack

_POLL_MS = 100


class _Reply(msgspec.Struct):
    """What of a reply is alike in all versions."""

    body: dict[str, Any]


def own_hello() -> Hello:
    """How this process names itself to a backend."""
    return Hello(f"pid {os.getpid()}", files.machine())


def ask(record: BackendRecord, body: Request, seconds: float) -> dict[str, Any] | None:
    """The answer's fields, its tag as `type`; None where none came within `seconds`, or the backend is gone."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(record.address)
        # A question that both versions know is understood; another one is refused.
        socket.send_multipart(pack(RequestHeader(1, body, version=record.version), []), zmq.NOBLOCK)
        deadline = time.monotonic() + seconds
        while not socket.poll(_POLL_MS):
            if time.monotonic() > deadline or not files.lives(record.pid, record.start_ticks):
                return None
        try:
            return msgspec.msgpack.decode(socket.recv_multipart()[0], type=_Reply).body
        except msgspec.DecodeError:
            return None
