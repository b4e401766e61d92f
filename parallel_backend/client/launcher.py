"""Starts a backend that outlives its starter, or finds the one that runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..command_line import command_line
from ..config import BackendSpec, ServeSpec
from ..errors import ConfigError, StartError
from ..rpc import runtime_dir as files
from ..rpc.keys import Keys
from ..rpc.runtime_dir import BackendRecord
from .cards import seen
from .differences import differences
from .ending import make_way
from .environment import environment
from .own_scope import scope_command, service_of
from .requirements import check_installed

START_SECONDS = 180.0
MAX_RESTARTS = 100
# Of a host among several: a start that lasted less was in vain, and so many in a row are the last ones.
GOOD_SECONDS, STARTS_IN_VAIN, LONGEST_PAUSE = 120.0, 30, 30.0
# What torchrun writes when a rank ends by itself; before the first "ready" nothing can be restarted into health.
_RANK_FAILED = "failed (exitcode:"
_ENDS_WITH = (
    "This backend ends when {service} is stopped or restarted, for systemd-run gives this user no scope of its own. "
    "To have it stay, run `parallel-mmdit serve` as a service (see README).\n"
)

# Called while a backend is waited for: with the seconds passed, and with what it waits for itself.
Waiting = Callable[[float, str], object]
# A backend of one host, for this user alone.
LOCAL = ServeSpec()


def unheard(seconds: float, what: str) -> None:
    """A Waiting that nobody looks at."""


def attach_or_start(
    spec: BackendSpec,
    waiting: Waiting = unheard,
    serve: ServeSpec = LOCAL,
    tell: Callable[[str], object] = lambda line: None,
) -> BackendRecord:
    """The record of a backend that is ready; starts one, detached, where none of that name runs.

    One that differs from `spec` and that nobody works with is ended first. Two callers at once start one backend: the second
    waits for the first. One whose ranks are being started anew is waited for too.

    Args:
        waiting: called about four times a second; what it raises ends the wait.
        tell: is told, in a sentence, that a backend made way for this one.
    Raises:
        BackendInUseError: one of that name differs, and is in use. ConfigError: as `make_way`.
        StartError: it did not come up; the details have the end of its log.
    """
    with start_lock(spec.name, waiting):
        found, before = _found(spec, serve, waiting, tell)
        if found is not None:
            return found
        # Which files a backend opens is not for this caller to widen.
        serve = before.serve if before is not None and serve == LOCAL else serve
        return wait_ready(spec, start(spec, serve, stays=True), waiting)


def find(spec: BackendSpec, serve: ServeSpec, tell: Callable[[str], object]) -> BackendRecord | None:
    """The running backend of that name, as `spec` says; None where none runs, or one made way.

    `serve`: what it is to be started with. Raises, and `tell`: as `attach_or_start`.
    """
    with start_lock(spec.name, unheard):
        return _found(spec, serve, unheard, tell)[0]


def _found(
    spec: BackendSpec, serve: ServeSpec, waiting: Waiting, tell: Callable[[str], object]
) -> tuple[BackendRecord | None, BackendRecord | None]:
    """The backend that runs as `spec` says, or None and the one, if any, that has made way for it."""
    before = None
    while (record := _settled(spec.name, waiting)) is not None:
        others = differences(record, spec)
        if others:
            check_here(spec, serve)  # what runs doesn't end for what can't be started
        if not others or not make_way(spec.name, record, others, waiting):
            return record, None
        tell(f"Restarted backend {spec.name!r}: it had {'; '.join(map(str, others))}.")
        before = record
    return None, before


def run(spec: BackendSpec, serve: ServeSpec) -> int:
    """A backend that ends with this process, its log on this terminal; its exit status.

    Raises: StartError: it did not come up.
    """
    log = _Shown(files.runtime_dir(spec.name) / "backend.log")
    with _ended_by_sigterm():
        with start_lock(spec.name, unheard):
            process = start(spec, serve)
            try:
                wait_ready(spec, process, lambda seconds, what: log.show())
            finally:
                log.show()
        return _follow(process, log)


def _settled(name: str, waiting: Waiting) -> BackendRecord | None:
    """The record of the backend that runs, once its ranks are ready where they are being started anew; None where none runs.

    Raises: StartError: it has been at it for too long.
    """
    begun = time.monotonic()
    while (record := files.read_record(name)) is None and files.restarting(name) is not None:
        passed = time.monotonic() - begun
        if passed > START_SECONDS:
            raise StartError(
                f"Backend {name!r} has been starting its ranks anew for {passed:.0f} s.",
                f"End it with `{command_line('stop', '--name', name)}`.",
                _log_end(name),
            )
        waiting(passed, "its ranks are being started anew")
        time.sleep(0.25)
    return record


def start(spec: BackendSpec, serve: ServeSpec = LOCAL, stays: bool = False) -> subprocess.Popen[bytes]:
    """torchrun in a session of its own, its output in the runtime folder's backend.log.

    Args:
        stays: it is to outlive the service, if any, that this process belongs to.
    Raises: as `check_here`.
    """
    check_here(spec, serve)
    folder = files.runtime_dir(spec.name)
    for left in (folder / "backend.json", folder / "last_good", *folder.glob(files.STAGE_NOTES)):
        left.unlink(missing_ok=True)
    log = folder / "backend.log"
    if log.exists():
        log.replace(folder / "backend.previous.log")
    service = service_of() if stays else ""
    apart = scope_command() if service else []
    with log.open("wb") as output:
        if service and not apart:
            output.write(_ENDS_WITH.format(service=service).encode())
            output.flush()
        return subprocess.Popen(
            [*apart, *command(spec, serve, foreground=not stays)],
            env=environment(spec, serve.hosts),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def check_here(spec: BackendSpec, serve: ServeSpec) -> None:
    """Before torchrun is started, whose ranks could tell of it in their logs alone.

    Raises: StartError: a package is missing or of another version. ConfigError: GPUs or keys that this machine doesn't have.
    """
    check_installed()
    if serve.keys:
        Keys(Path(serve.keys)).check()
    if spec.device != "cuda":
        return
    here = seen()
    wanted = spec.devices or tuple(range(spec.world_size))
    if absent := [ordinal for ordinal in wanted if not 0 <= ordinal < len(here.cards)]:
        hidden = f" {here.hidden() or f'{here.by}={here.visible}.'}" if here.narrowed else ""
        raise ConfigError(
            f"GPUs {', '.join(map(str, absent))} were asked for; torch sees {len(here.cards)} here.{hidden}",
            "Use fewer ranks, other devices, or device 'cpu'"
            + (f"; or start ComfyUI without --cuda-device, and with {here.by} unset." if here.narrowed else "."),
        )


def command(spec: BackendSpec, serve: ServeSpec = LOCAL, *, foreground: bool = False) -> list[str]:
    """The torchrun command of a backend on this host; one in the `foreground` belongs to who has started it."""
    hosts = serve.hosts
    # Else torchrun looks up this host's name, which may have no address.
    meeting = ["--standalone", "--local-addr=127.0.0.1", f"--max-restarts={MAX_RESTARTS}"]
    if hosts.count > 1:
        # Ranks are numbered by host, so that tp and ulysses, the innermost axes, stay inside one. Restarts are `supervise`'s.
        address, _, port = hosts.rendezvous.rpartition(":")
        meeting = [f"--nnodes={hosts.count}", f"--node-rank={hosts.index}", "--max-restarts=0"]
        meeting += [f"--master-addr={address}", f"--master-port={port}"]
    options = [("--listen", serve.listen), ("--keys", serve.keys), *(("--models", folder) for folder in serve.models)]
    options.append(("--metrics-port", str(serve.metrics_port) if serve.metrics_port else ""))
    return [
        sys.executable,
        *("-m", "torch.distributed.run", f"--nproc-per-node={spec.world_size}", *meeting),
        *("-m", "parallel_backend.rank.server"),
        *("--name", spec.name, "--device", spec.device, "--devices", ",".join(map(str, spec.devices))),
        *("--idle-seconds", str(spec.idle_seconds), "--memory-budget", str(spec.memory_budget)),
        *(part for name, value in options if value for part in (name, value)),
        *(["--foreground"] if foreground else []),
    ]


def supervise(spec: BackendSpec, serve: ServeSpec) -> int:
    """One host's part of a backend of several, started anew, on every host alike, whenever it falls; its exit status.

    Hosts meet again in their own time: each waits at the rendezvous, and a start in vain makes the next pause longer.
    """
    check_here(spec, serve)
    env = environment(spec, serve.hosts)
    env["PARALLEL_MMDIT_AGENT_PID"] = str(os.getpid())
    path, in_vain = files.runtime_dir(spec.name) / "backend.log", 0
    path.unlink(missing_ok=True)
    log = _Shown(path)
    while True:
        begun = time.monotonic()
        with _ended_by_sigterm(), path.open("ab") as output:
            process = subprocess.Popen(
                command(spec, serve, foreground=True),
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = _follow(process, log)
        if status == 0:
            return 0
        in_vain = 0 if time.monotonic() - begun > GOOD_SECONDS else in_vain + 1
        if in_vain > STARTS_IN_VAIN:
            return status
        pause = min(LONGEST_PAUSE, 2.0**in_vain)
        print(f"The ranks of host {serve.hosts.index} fell; they are started again in {pause:.0f} s.", file=sys.stderr)
        time.sleep(pause)


class _Shown:
    """A log that is copied to this terminal as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def show(self) -> None:
        with suppress(FileNotFoundError), self._path.open("rb") as log:
            log.seek(self._read)
            text = log.read()
            self._read += len(text)
            sys.stderr.write(text.decode(errors="replace"))


def _follow(process: subprocess.Popen[bytes], log: _Shown) -> int:
    """The exit status of `process`, which ends when this one is interrupted."""
    try:
        while process.poll() is None:
            log.show()
            time.sleep(0.25)
    finally:
        _end(process)
        log.show()
    return process.returncode


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM unwinds the block, as an interrupt does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_ready(spec: BackendSpec, process: subprocess.Popen[bytes], waiting: Waiting) -> BackendRecord:
    """The record, once every rank has acknowledged.

    Args:
        process: its torchrun, which is ended where this raises.
    Raises: StartError: torchrun ended, or nothing came within START_SECONDS.
    """
    begun, clock = time.monotonic(), time.time()
    try:
        while (record := files.read_record(spec.name)) is None:
            passed = time.monotonic() - begun
            if process.poll() is not None or _RANK_FAILED in files.log_tail(spec.name, 200):
                words = files.last_words(spec.name, clock) or files.last_raised(spec.name)
                raise _start_error(spec, f"ended while it started{': ' + words.rstrip('.') if words else ''}")
            if passed > START_SECONDS:
                raise _start_error(spec, f"was not ready after {passed:.0f} s")
            waiting(passed, _stage(spec, process, clock))
            time.sleep(0.25)
    except BaseException:
        _end(process)
        raise
    return record


def _stage(spec: BackendSpec, process: subprocess.Popen[bytes], since: float) -> str:
    """What a backend that starts waits for, by what its ranks have left word of."""
    stages = files.stages(spec.name, since)
    if not stages:
        return "importing torch" if files.children(process.pid) else "starting torchrun"
    least = min(stages.values(), key=files.STAGES.index)
    here = len(stages)
    if least == files.STAGES[0] or here < spec.world_size:
        return f"ranks meet, {here} of {spec.world_size} there"
    return least


def _start_error(spec: BackendSpec, what: str) -> StartError:
    log = files.runtime_dir(spec.name) / "backend.log"
    return StartError(f"Backend {spec.name!r} {what}.", f"Its log says more: {log}.", _log_end(spec.name))


def _log_end(name: str) -> str:
    return f"Its log ends:\n{files.log_tail(name)}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """No rank of a start that failed stays behind."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def start_lock(name: str, waiting: Waiting) -> Iterator[None]:
    """Inside, no other process starts, or restarts, the backend of that name."""
    path = files.runtime_dir(name) / "lock"
    import fcntl  # not there where ranks can't run, and the folder has said so

    with path.open("w") as lock:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting(time.monotonic() - begun, "another process starts it")
                time.sleep(0.25)
        yield


def starting() -> dict[str, str]:
    """What the ranks of each backend are at that a process, this or another, is starting or restarting now, by its name."""
    found: dict[str, str] = {}
    try:
        locks = list(files.runtime_root().glob("*/lock"))
    except StartError:  # ranks can't run here; those of other machines can be used
        return found
    for lock in locks:
        name = lock.parent.name
        with suppress(StartError, OSError):
            if _is_held(lock) and files.read_record(name) is None:
                at = files.stages(name, lock.stat().st_mtime).values()
                found[name] = f"{len(at)} ranks are {min(at, key=files.STAGES.index)}" if at else "importing torch"
    return found


def _is_held(path: Path) -> bool:
    """Whether a process is inside `start_lock`. Asked for a moment it is shared, and a starter that comes just then tries again."""
    import fcntl

    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
