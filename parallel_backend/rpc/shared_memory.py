"""Tensors of a request that lie in a file of memory, which ranks of the same machine map in place of a frame on the socket.

Each rank then reads the rows or tokens that are its own, where a frame goes to all of them whole. A client rewrites its file with
each request; its ranks have read it when they answer. Its name is random, which keeps others from guessing it.
"""

from __future__ import annotations

import re
import uuid
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


def folders() -> list[Path]:
    """Where such files lie: in the first that has room."""
    return [folder for folder in _FOLDERS if folder.is_dir()]
