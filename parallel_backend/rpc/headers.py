"""What goes before a message's tensors: whose answer it is, its body, and of each tensor what it is and where it lies."""

from __future__ import annotations

import msgspec

from ..version import __version__
from .messages import Reply, Request


class SharedPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a tensor begins, in bytes, in a file of memory: see shared_memory.py."""

    name: str
    start: int


class TensorMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the message. One with a `key` is kept; `sent` says that a frame follows, else it is kept already, or `shared`."""

    dtype: str
    shape: list[int]
    sent: bool = True
    key: str | None = None
    shared: SharedPlace | None = None


class SharedRoom(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of a client's file of memory that are free, from `start` on, for the tensors of the final reply."""

    name: str
    start: int
    nbytes: int

    def holds(self, start: int, nbytes: int) -> bool:
        return self.start <= start and start + nbytes <= self.start + self.nbytes


class RequestHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`room`: where the reply's tensors may lie, if rank 0 sees that file; else they go by the socket."""

    job: int
    body: Request
    tensors: list[TensorMeta] = []
    room: SharedRoom | None = None
    version: str = __version__


class ReplyHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    job: int
    body: Reply
    tensors: list[TensorMeta] = []
