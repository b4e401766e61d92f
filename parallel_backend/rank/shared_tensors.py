"""Tensors that a client of this machine has laid into a file of memory: mapped, so that a rank reads its own part alone.

What a request gives is laid there too, where the request has room for it.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod

import torch
from torch import Tensor

from ..errors import ProtocolError, UnseenTensorsError
from ..rpc.headers import SharedPlace, SharedRoom, TensorMeta
from ..rpc.shared_memory import folders, is_shared_file, starts, write
from ..rpc.wire import Sendable, dtype_named, tensor_frame, tensor_meta

_UNSEEN = "Run the prompt again: they go by the socket then."


class SharedTensors:
    """Those of the last request; the file that they are in stays mapped, since most requests of a client are alike."""

    def __init__(self) -> None:
        self._name = ""
        self._map: mmap.mmap | None = None

    def complete(self, metas: Sequence[TensorMeta], tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """All tensors of a message, of which `tensors` has those that lie in no file; read-only, and rewritten after the reply.

        Raises: UnseenTensorsError: this rank's machine has no such file. ProtocolError: it is too short, or none of a client's.
        """
        return [
            tensor if tensor is not None else self._mapped(meta) for meta, tensor in zip(metas, tensors, strict=True)
        ]

    def forget(self) -> None:
        """The file is let go of: its client may be gone, and its memory is held as long as it is mapped."""
        self._map = None

    def _mapped(self, meta: TensorMeta) -> Tensor:
        assert meta.shared is not None
        dtype, count, start = dtype_named(meta), prod(meta.shape), meta.shared.start
        end = start + count * dtype.itemsize
        if start < 0 or start % dtype.itemsize:
            raise ProtocolError(
                f"A tensor begins at byte {start} of a file.", "Begin at a multiple of its items' size."
            )
        if self._map is None or self._name != meta.shared.name or len(self._map) < end:
            self._map, self._name = _open(meta.shared.name), meta.shared.name
        if end > len(self._map):
            raise ProtocolError(
                f"A tensor ends at byte {end} of a file of {len(self._map)}.", "Write it before it is named."
            )
        if count == 0:
            return torch.empty(meta.shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(meta.shape)


def laid(room: SharedRoom | None, tensors: Sequence[Tensor]) -> Sequence[Sendable]:
    """What to send of a reply: the places of its tensors, laid into the client's file; themselves, where they can't be.

    Raises: ProtocolError: the file is shorter than its client says, or none of a client's.
    """
    *places, _ = starts([tensor.nbytes for tensor in tensors])
    if room is None or not tensors or places[-1] + tensors[-1].nbytes > room.nbytes:
        return tensors
    with suppress(UnseenTensorsError, OSError), _opened(room.name, os.O_WRONLY) as file:
        if room.start + room.nbytes > (size := os.fstat(file).st_size):
            raise ProtocolError(
                f"The room for a reply ends at byte {room.start + room.nbytes} of a file of {size}.", "Make it first."
            )
        for tensor, start in zip(tensors, places, strict=True):
            write(file, tensor_frame(tensor), room.start + start)
        there = [SharedPlace(room.name, room.start + start) for start in places]
        return [tensor_meta(x, sent=False, shared=place) for x, place in zip(tensors, there, strict=True)]
    return tensors


def _open(name: str) -> mmap.mmap:
    with _opened(name, os.O_RDONLY) as file:
        return mmap.mmap(file, os.fstat(file).st_size, prot=mmap.PROT_READ)


@contextmanager
def _opened(name: str, mode: int) -> Iterator[int]:
    """The client's file of that name.

    Raises: UnseenTensorsError: this rank's machine has no such file of its user. ProtocolError: none of a client's.
    """
    if not is_shared_file(name):
        raise ProtocolError(f"{name!r} is no file of a client's.", "Name one that a client has written.")
    for folder in folders():
        try:
            file = os.open(folder / name, mode | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # it lies in another folder, or is a link, or another user's
            continue
        try:
            info = os.fstat(file)
            if stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid() and info.st_size:
                yield file
                return
        finally:
            os.close(file)
    raise UnseenTensorsError(f"This rank's machine has no file {name}.", _UNSEEN)
