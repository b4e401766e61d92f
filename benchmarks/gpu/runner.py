"""Runs sections one after the other, each in a process of its own that is ended when its time is up."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .options import ROOT, Options
from .report import DONE, Told

# Between the request to end and the kill: what a section has started (ranks, backends) is to go with it.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Section:
    """A module with `run(report, options)`. Seconds: what it should take on an H100, and when it is ended."""

    name: str
    module: str
    estimate: float
    limit: float


def run_all(
    sections: Sequence[Section], options: Options, show: Callable[[str], None], log: Path, patience: float = 1.0
) -> list[Told]:
    """What each section told. A section may use what those before it have left of their limits, so the sum holds.

    Args:
        log: gets what the sections write elsewhere.
        patience: all limits times this.
    """
    told, deadline = [], time.monotonic()
    for section in sections:
        deadline += section.limit * patience
        left = deadline - time.monotonic()
        show(f"\n## {section.name} (about {section.estimate:.0f} s, at most {left:.0f} s)")
        told.append(run_section(section, options, show, log, left))
        show(f"\n{section.name}: {told[-1].ended}, {told[-1].seconds:.1f} s")
    return told


def run_section(section: Section, options: Options, show: Callable[[str], None], log: Path, seconds: float) -> Told:
    """What one section told within `seconds`, and whether it ended by itself."""
    told, begun = Told(section.name), time.monotonic()
    with log.open("ab") as errors:
        errors.write(f"\n===== {section.name}\n".encode())
        errors.flush()
        process = subprocess.Popen(
            command(section, options),
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(options),
            start_new_session=True,
        )
        in_time = _listen(process, begun + seconds, lambda line: [show(words) for words in told.take(line)])
        _end(process, options)
    if told.ended != DONE:
        told.ended = f"failed: {_last_line(log)}" if in_time else f"ended at its limit of {seconds:.0f} s"
    told.seconds = time.monotonic() - begun
    return told


def command(section: Section, options: Options) -> list[str]:
    size = ["--tiny"] if options.tiny else []
    where = ["--device", options.device, "--scratch", str(options.scratch), *size]
    return [sys.executable, "-m", "benchmarks.gpu.section", section.module, *where]


def environment(options: Options) -> dict[str, str]:
    """This one's, with the repository importable, and with a runtime folder apart from other backends of this user."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    runtime = options.scratch / "runtime"
    runtime.mkdir(parents=True, exist_ok=True)
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PARALLEL_MMDIT_RUNTIME_DIR": str(runtime)}
    # On a CPU nothing is measured, and threads that wait for each other are slow on a busy machine.
    return os.environ | own | ({"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {})


def _listen(process: subprocess.Popen[bytes], deadline: float, take: Callable[[str], object]) -> bool:
    """Hands on each line as it comes; whether the section closed its line before the deadline."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    with process.stdout, selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            read = os.read(descriptor, 65536)
            if not read:
                return True
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                take(line.decode())
    return False


def _end(process: subprocess.Popen[bytes], options: Options) -> None:
    """The section and all that it started are gone."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Backends outlive who starts them. Their ranks end when they see that their torchrun is gone.
    for record in (options.scratch / "runtime").glob("*/backend.json"):
        with suppress(ProcessLookupError, ValueError, KeyError):
            os.kill(json.loads(record.read_text())["agent_pid"], signal.SIGKILL)
        record.unlink(missing_ok=True)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"


def write_results(told: Sequence[Told], path: Path) -> None:
    path.write_text(json.dumps([asdict(section) for section in told], indent=1))
