"""Tensors of a request that lie in a file of memory, which ranks of the same machine map in place of a frame on the socket.

Each rank then reads the rows or tokens that are its own, where a frame goes to all of them whole; rank 0 lays the result beside them,
where the request says that there is room. A client rewrites its file with each request: its ranks have read it when they answer, and
a request that was given up takes its file with it. Its name is random, which keeps others from guessing it.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

# Memory where there is a file system of it, else what the system keeps in memory as long as it can.
_FOLDERS = (Path("/dev/shm"), Path("/tmp"))
_NAME = re.compile(r"parallel-mmdit-[0-9a-f]{32}\.tensors")
ALIGNED = 64


def new_name() -> str:
    """Of a file that is nowhere yet."""
    return f"parallel-mmdit-{uuid.uuid4().hex}.tensors"


def is_shared_file(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def starts(sizes: Sequence[int]) -> list[int]:
    """Where tensors of so many bytes begin, one after the other, and where the last one ends."""
    return [0, *accumulate(-(-size // ALIGNED) * ALIGNED for size in sizes)]


def write(file: int, frame: memoryview, start: int) -> None:
    written = 0
    while written < len(frame):
        written += os.pwrite(file, frame[written:], start + written)


def folders() -> list[Path]:
    """Where such files lie: in the first that has room."""
    return [folder for folder in _FOLDERS if folder.is_dir()]
