"""Tensors that a client of this machine has laid into a file of memory: mapped, so that a rank reads its own part alone."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from ..errors import ProtocolError, UnseenTensorsError
from ..rpc.messages import TensorMeta
from ..rpc.shared_memory import folders, is_shared_file
from ..rpc.wire import dtype_named

_UNSEEN = "Run the prompt again: they go by the socket then."


class SharedTensors:
    """Those of the last request; the file that they are in stays mapped, since most requests of a client are alike."""

    def __init__(self) -> None:
        self._name = ""
        self._map: mmap.mmap | None = None

    def complete(self, metas: Sequence[TensorMeta], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors of a message, those that lie in a file in their places; read-only, and rewritten after the reply.

        Raises: UnseenTensorsError: this rank's machine has no such file. ProtocolError: it is too short, or none of a client's.
        """
        return [
            tensor if meta.shared is None else self._mapped(meta) for meta, tensor in zip(metas, tensors, strict=True)
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


def _open(name: str) -> mmap.mmap:
    if not is_shared_file(name):
        raise ProtocolError(f"{name!r} is no file of a client's.", "Name one that a client has written.")
    for folder in folders():
        with suppress(FileNotFoundError):
            file = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                info = os.fstat(file)
                if info.st_uid == os.getuid() and info.st_size:
                    return mmap.mmap(file, info.st_size, prot=mmap.PROT_READ)
            finally:
                os.close(file)
    raise UnseenTensorsError(f"This rank's machine has no file {name}.", _UNSEEN)
