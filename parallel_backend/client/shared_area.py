"""A file of memory in which a client lays the large tensors of its requests, and ranks of this machine their results."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ProtocolError
from ..rpc.headers import SharedPlace, SharedRoom, TensorMeta
from ..rpc.shared_memory import ALIGNED, folders, is_shared_file, new_name, starts, write
from ..rpc.wire import dtype_named, tensor_frame

log = logging.getLogger("parallel_backend")


class SharedArea:
    """Made with the first tensor, removed when it is closed, collected, or its process has ended."""

    def __init__(self) -> None:
        # Those that may have room; it lies in the first.
        self._folders = folders()
        self._path: Path | None = None
        self._file = -1
        # Behind what was laid last.
        self._free = 0
        self._room: SharedRoom | None = None
        self._told = False
        self._end = lambda: None

    def lay(self, tensors: Sequence[Tensor]) -> list[SharedPlace] | None:
        """Where each of them lies until the next call; None where this machine has no room for them."""
        *places, size = starts([tensor.nbytes for tensor in tensors])
        self._free = size
        while self._folders:
            try:
                path = self._with_room(self._folders[0], max(ALIGNED, size))
                for tensor, start in zip(tensors, places, strict=True):
                    write(self._file, tensor_frame(tensor), start)
                return [SharedPlace(path.name, start) for start in places]
            except OSError as error:
                self.close()
                full = self._folders.pop(0)
                where = f"in {self._folders[0]} instead" if self._folders else "by the socket"
                log.warning("no room for %d tensors in %s (%s): they go %s", len(tensors), full, error.strerror, where)
        return None

    def room(self, nbytes: int) -> SharedRoom | None:
        """So many bytes for the reply, behind what was laid for the request; None where there is no room for them."""
        self._room = None
        if self._path is not None and nbytes:
            try:
                path = self._with_room(self._folders[0], self._free + nbytes)
                self._room = SharedRoom(path.name, self._free, nbytes)
            except OSError as error:
                # In every evaluation of a sampling it would be told again.
                log.log(
                    logging.DEBUG if self._told else logging.WARNING,
                    "no room for a result in %s (%s): it goes by the socket",
                    self._folders[0],
                    error.strerror,
                )
                self._told = True
        return self._room

    def read(self, meta: TensorMeta) -> Tensor:
        """What a rank has laid into the room of the last request, copied out of it.

        Raises: ProtocolError: it lies elsewhere.
        """
        place, room, dtype = meta.shared, self._room, dtype_named(meta)
        nbytes = prod(meta.shape) * dtype.itemsize
        if place is None or room is None or place.name != room.name or not room.holds(place.start, nbytes):
            raise ProtocolError("A reply's tensor lies where no room was made for it.", "Run the prompt again.")
        tensor = torch.empty(meta.shape, dtype=dtype)
        frame, done = tensor_frame(tensor), 0
        while done < len(frame):
            read = os.preadv(self._file, [frame[done:]], place.start + done)
            if not read:
                raise ProtocolError("A reply's tensor ends before its last byte.", "Run the prompt again.")
            done += read
        return tensor

    def close(self) -> None:
        self._end()
        self._path, self._room, self._end = None, None, lambda: None

    def _with_room(self, folder: Path, size: int) -> Path:
        """The file, `size` bytes of which are there: what a system only promises may fail a rank that reads it.

        Raises: OSError: the folder has no room for it.
        """
        if self._path is None:
            _remove_left(folder)
            self._path, self._file = _made(folder)
            self._end = weakref.finalize(self, _remove, self._path, self._file)
        if os.fstat(self._file).st_size < size:
            os.posix_fallocate(self._file, 0, size)
        return self._path


def _made(folder: Path) -> tuple[Path, int]:
    """A new file there, whose lock this process holds as long as it lives.

    Raises: OSError.
    """
    import fcntl  # not there where ranks can't run

    while True:
        path = folder / new_name()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file).st_nlink:  # else a client that began just then has found it without its lock
                return path, file
        except OSError:
            _remove(path, file)
            raise
        os.close(file)


def _remove(path: Path, file: int) -> None:
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        os.close(file)


def _remove_left(folder: Path) -> None:
    """What processes left that have ended without a chance to remove it.

    Its lock tells, which the system lets go of. Numbers of processes can't: containers that share the folder have their own.
    """
    import fcntl

    for path in filter(lambda path: is_shared_file(path.name), folder.glob("parallel-mmdit-*")):
        with suppress(OSError):  # of another user's, and of one that is locked
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if os.fstat(file).st_uid == os.getuid():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(file)
