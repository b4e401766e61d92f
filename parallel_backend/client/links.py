"""The proof of the ranks' links alone, for who asks before a backend is started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec

from ..config import BackendSpec
from ..errors import StartError
from ..rpc import runtime_dir as files
from . import launcher

# Ranks that never meet say so themselves, sooner than this.
MOST_SECONDS = 240.0
_LOOK_AT = "See nvidia-smi and dmesg."
_FIGURES = re.compile(r"INFO (.* GB/s)$", re.MULTILINE)


def prove_links(spec: BackendSpec) -> list[str]:
    """What each link carries, as rank 0 has measured it, from ranks that are started for this and end with it.

    Raises: StartError: they don't hear each other; it has what they said last.
    """
    return _FIGURES.findall(_meet(spec))


def measure_links(spec: BackendSpec) -> list[tuple[str, int, float]]:
    """Of each kind of message, small and large ones: bytes that a rank sends, and seconds, in ranks as `prove_links` starts them.

    Raises: StartError: as `prove_links`.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "links.json"
        _meet(spec, "--measure-links", str(file))
        return msgspec.json.decode(file.read_bytes(), type=list[tuple[str, int, float]])


def _meet(spec: BackendSpec, *arguments: str) -> str:
    """What ranks have said that met and ended."""
    own = msgspec.structs.replace(spec, name=f"{spec.name}-links-{os.getpid()}")
    launcher.check_here(own, launcher.LOCAL)
    folder, begun = files.runtime_dir(own.name), time.time()
    command = [part for part in launcher.command(own) if not part.startswith("--max-restarts")]
    try:
        done = subprocess.run(
            [*command, "--only-meet", *arguments],
            env=launcher.environment(own),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
        )
        if done.returncode:
            words = files.last_words(own.name, begun)
            if words is not None:  # with the remedy
                raise StartError(f"The ranks don't reach each other: {words}")
            raise StartError("The ranks ended before they met.", _LOOK_AT, "\n".join(done.stderr.splitlines()[-15:]))
        return done.stderr
    except subprocess.TimeoutExpired:
        raise StartError(f"The ranks had not met after {MOST_SECONDS:.0f} s.", _LOOK_AT) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
