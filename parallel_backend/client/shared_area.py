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
from ..rpc.runtime_dir import is_alive
from ..rpc.shared_memory import ALIGNED, folders, new_name, writer_of
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
                path = folder / new_name()
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                self._path, self._end = path, weakref.finalize(self, _remove, path, self._file)
                return True
        self._full = True
        return False


def _remove(path: Path, file: int) -> None:
    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        os.close(file)


def _remove_left(folder: Path) -> None:
    """What processes left that have ended without a chance to remove it."""
    for path in folder.glob("parallel-mmdit-*.tensors"):
        pid = writer_of(path.name)
        with suppress(OSError):
            if pid is not None and not is_alive(pid) and path.stat().st_uid == os.getuid():
                path.unlink()
