"""Which code this is: a hash over the package's own files, since a clone changes without its version."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def code_hash(package: Path = _PACKAGE) -> str:
    """Of the files as they lie there now; alike wherever the package lies."""
    files = sorted((path.relative_to(package).as_posix(), path) for path in package.rglob("*.py"))
    found = hashlib.sha256()
    for name, path in files:
        found.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


# Of what this process runs: an update that comes later counts once it is started anew.
LOADED = code_hash()
