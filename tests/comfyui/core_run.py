"""Runs the scripts beside this file in ComfyUI's own environment: all of a session share one import of its core."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from .installation import HERE, ComfyInstallation


def run_script(comfy: ComfyInstallation, script: str, *arguments: object, seconds: float, **environment: str) -> str:
    """What the script printed, once it has ended well.

    Args:
        script: its name beside this file, which gets ComfyUI's folder and then `arguments`.
        environment: what it has beside this process' own.
    Raises: AssertionError: it failed, or took longer than `seconds`; says what it wrote to stderr.
    """
    with TemporaryDirectory(prefix="pmcore-") as folder:
        given = [str(argument) for argument in (comfy.folder, *arguments)]
        line = _host(comfy)
        line.send((str(HERE / script), given, os.environ | {"PYTHONPATH": str(HERE)} | environment, folder))
        process = line.recv()
        ended = line.poll(seconds)
        if not ended:
            os.kill(process, signal.SIGKILL)
        code = line.recv()
        assert ended, f"{script} took longer than {seconds} s: {_written(folder, 'err')[-3000:]}"
        assert code == 0, f"{script} ended with {code}: {_written(folder, 'err')[-3000:]}"
        return _written(folder, "out")


@cache
def _host(comfy: ComfyInstallation) -> Connection:
    """The line to a process that has imported that core; it ends with this process, whose end of the line closes."""
    ours, theirs = Pipe()
    command = [comfy.python, str(HERE / "core_host.py"), str(comfy.folder), str(theirs.fileno())]
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    return ours


def _written(folder: str, name: str) -> str:
    file = Path(folder, name)
    return file.read_text(errors="replace") if file.exists() else ""
