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

from ..config import BackendSpec, ServeSpec
from ..errors import ConfigError, StartError
from ..rpc import runtime_dir as files
from ..rpc.keys import Keys
from ..rpc.runtime_dir import BackendRecord
from ..version import __version__
from .cards import seen
from .environment import environment
from .own_scope import scope_command, service_of
from .requirements import check_installed

START_SECONDS = 180.0
KILL_SECONDS = 10.0
MAX_RESTARTS = 100
# Of a host among several: a start that lasted less was in vain, and so many in a row are the last ones.
GOOD_SECONDS, STARTS_IN_VAIN, LONGEST_PAUSE = 120.0, 30, 30.0
# What torchrun writes when a rank ends by itself; before the first "ready" nothing can be restarted into health.
_RANK_FAILED = "failed (exitcode:"
_ENDS_WITH = (
    "This backend ends when {service} is stopped or restarted, for systemd-run gives this user no scope of its own. "
    "To have it stay, run `parallel-mmdit serve` as a service (see README).\n"
)

Waiting = Callable[[float], object]
# A backend of one host, for this user alone.
LOCAL = ServeSpec()


def find(spec: BackendSpec) -> BackendRecord | None:
    """The running backend of that name; None where none runs.

    Raises: ConfigError: it runs with other ranks, other GPUs or another version than `spec` asks for.
    """
    record = files.read_record(spec.name)
    if record is not None:
        _check_same(record, spec)
    return record


def _check_same(record: BackendRecord, spec: BackendSpec) -> None:
    stop = f"stop it with `python -m parallel_backend stop --name {spec.name}`, or use another backend name."
    if record.version != __version__:
        raise ConfigError(
            f"Backend {spec.name!r} runs version {record.version}, this is {__version__}.", f"First {stop}"
        )
    devices = list(spec.devices)
    cards = seen().uuids(devices or range(spec.world_size)) if spec.device == "cuda" and any(record.cards) else []
    # A number is another card to a process that sees others.
    wanted, there = (sorted(cards), sorted(record.cards)) if cards else (devices, record.devices)
    if (record.world_size, record.device, there) != (spec.world_size, spec.device, wanted):
        raise ConfigError(
            f"Backend {spec.name!r} runs with {record.world_size} ranks on {_place(record.device, record.devices, record.cards)}; "
            f"{spec.world_size} on {_place(spec.device, devices, cards)} were asked for.",
            f"Ask for what runs, {stop}",
        )


def _place(device: str, devices: list[int], cards: list[str]) -> str:
    uuids = ", ".join(filter(None, cards))
    return f"{device} {','.join(map(str, devices))}".strip() + (f" ({uuids})" if uuids else "")


def attach_or_start(
    spec: BackendSpec,
    waiting: Waiting = lambda seconds: None,
    serve: ServeSpec = LOCAL,
) -> BackendRecord:
    """The record of a backend that is ready; starts one, detached, where none of that name runs.

    Two callers at once start one backend: the second waits for the first. One whose ranks are being started anew is
    waited for too.

    Args:
        waiting: called about four times a second with the seconds passed; what it raises ends the wait.
    Raises: StartError: it did not come up; the details have the end of its log.
    """
    with _start_lock(spec.name, waiting):
        return find(spec) or _restarted(spec, waiting) or wait_ready(spec, start(spec, serve, stays=True), waiting)


def run(spec: BackendSpec, serve: ServeSpec) -> int:
    """A backend that ends with this process, its log on this terminal; its exit status.

    Raises: StartError: it did not come up.
    """
    log = _Shown(files.runtime_dir(spec.name) / "backend.log")
    with _ended_by_sigterm():
        with _start_lock(spec.name, lambda seconds: None):
            process = start(spec, serve)
            try:
                wait_ready(spec, process, lambda seconds: log.show())
            finally:
                log.show()
        return _follow(process, log)


def end(name: str, seconds: float = 20.0) -> bool:
    """Ends a backend that can't be asked to stop: one of another version, or between two starts of its ranks.

    Returns: whether there was one. Raises: as `kill`.
    """
    record = files.read_record(name) or files.restarting(name)
    if record is None:
        return False
    os.kill(record.agent_pid, signal.SIGTERM)
    if not files.wait_until_gone(record.agent_pid, seconds):
        kill(name, record.agent_pid)
    (files.runtime_dir(name) / "backend.json").unlink(missing_ok=True)
    return True


def kill(name: str, agent_pid: int) -> None:
    """torchrun and its ranks are gone, whatever they were waiting for.

    Raises: StartError: the kernel can't end them, as where a driver is stuck.
    """
    pids = [agent_pid, *files.children(agent_pid)]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left := [pid for pid in pids if not files.wait_until_gone(pid, KILL_SECONDS)]:
        raise StartError(
            f"Backend {name!r} was killed, and process {', '.join(map(str, left))} is still there.",
            "It hangs in the kernel, most likely in the GPU's driver: see dmesg; only a restart of the machine ends that.",
        )


def _restarted(spec: BackendSpec, waiting: Waiting) -> BackendRecord | None:
    """The record of a backend that starts its ranks anew, once they are ready; None where none does, or it gave up.

    Raises: ConfigError: as `find`. StartError: it has been at it for too long.
    """
    begun = time.monotonic()
    while (left := files.restarting(spec.name)) is not None:
        _check_same(left, spec)
        passed = time.monotonic() - begun
        if passed > START_SECONDS:
            raise StartError(
                f"Backend {spec.name!r} has been starting its ranks anew for {passed:.0f} s.",
                f"End it with `python -m parallel_backend stop --name {spec.name}`.",
                _log_end(spec.name),
            )
        waiting(passed)
        time.sleep(0.25)
    return find(spec)


def start(spec: BackendSpec, serve: ServeSpec = LOCAL, stays: bool = False) -> subprocess.Popen[bytes]:
    """torchrun in a session of its own, its output in the runtime folder's backend.log.

    Args:
        stays: it is to outlive the service, if any, that this process belongs to.
    Raises: as `check_here`.
    """
    check_here(spec, serve)
    folder = files.runtime_dir(spec.name)
    for left in ("backend.json", "last_good"):
        (folder / left).unlink(missing_ok=True)
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
            [*apart, *command(spec, serve)],
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


def command(spec: BackendSpec, serve: ServeSpec = LOCAL) -> list[str]:
    """The torchrun command of a backend on this host."""
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
                command(spec, serve), env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
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
            waiting(passed)
            time.sleep(0.25)
    except BaseException:
        _end(process)
        raise
    return record


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
def _start_lock(name: str, waiting: Waiting) -> Iterator[None]:
    path = files.runtime_dir(name) / "lock"
    import fcntl  # not there where ranks can't run, and the folder has said so

    with path.open("w") as lock:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting(time.monotonic() - begun)
                time.sleep(0.25)
        yield
