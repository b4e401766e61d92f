"""A file of memory in which a client lays the large tensors of its requests, for ranks of this machine."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ..rpc.messages import SharedPlace
from ..rpc.shared_memory import ALIGNED, folders, is_shared_file, new_name
from ..rpc.wire import tensor_frame

log = logging.getLogger("parallel_backend")


class SharedArea:
    """Made with the first tensor, removed when it is closed, collected, or its process has ended."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file = -1
        self._end = lambda: None
        self._full = False

    def lay(self, tensors: Sequence[Tensor]) -> list[SharedPlace] | None:
        """Where each of them lies until the next call; None where this machine has no room for them."""
        if self._full or (self._path is None and not self._open()):
            return None
        assert self._path is not None
        places, start = [], 0
        try:
            for tensor in tensors:
                places.append(SharedPlace(self._path.name, start))
                frame, written = tensor_frame(tensor), 0
                while written < len(frame):
                    written += os.pwrite(self._file, frame[written:], start + written)
                start += -(-len(frame) // ALIGNED) * ALIGNED
            return places
        except OSError as error:
            log.warning("no room for %d tensors in %s (%s): they go by the socket", len(tensors), self._path, error)
            self.close()
            self._full = True
            return None

    def close(self) -> None:
        self._end()
        self._path, self._end = None, lambda: None

    def _open(self) -> bool:
        for folder in folders():
            _remove_left(folder)
            with suppress(OSError):
                self._path, self._file = _made(folder)
                self._end = weakref.finalize(self, _remove, self._path, self._file)
                return True
        self._full = True
        return False


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
