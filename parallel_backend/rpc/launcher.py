"""Starts a backend that outlives its starter, or finds the one that runs."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import BackendSpec, ServeSpec
from ..errors import ConfigError, StartError
from ..version import __version__
from . import runtime_dir as files
from .runtime_dir import BackendRecord

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0
MAX_RESTARTS = 100
# Of a host among several: a start that lasted less was in vain, and so many in a row are the last ones.
GOOD_SECONDS, STARTS_IN_VAIN, LONGEST_PAUSE = 120.0, 30, 30.0
# What torchrun writes when a rank ends by itself; before the first "ready" nothing can be restarted into health.
_RANK_FAILED = "failed (exitcode:"

Waiting = Callable[[float], object]
# A backend of one host, for this user alone.
LOCAL = ServeSpec()


def default_ranks() -> tuple[str, int]:
    """("cuda", all GPUs), or ("cpu", 2) where there is none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ("cuda", count) if count else ("cpu", 2)


def find(spec: BackendSpec) -> BackendRecord | None:
    """The running backend of that name; None where none runs.

    Raises: ConfigError: it runs with other ranks or another version than `spec` asks for.
    """
    record = files.read_record(spec.name)
    if record is None:
        return None
    stop = f"stop it with `python -m parallel_backend stop --name {spec.name}`, or use another backend name."
    if record.version != __version__:
        raise ConfigError(
            f"Backend {spec.name!r} runs version {record.version}, this is {__version__}.", f"First {stop}"
        )
    wanted = (spec.world_size, spec.device, list(spec.devices))
    if (record.world_size, record.device, record.devices) != wanted:
        raise ConfigError(
            f"Backend {spec.name!r} runs with {record.world_size} ranks on {_place(record.device, record.devices)}; "
            f"{spec.world_size} on {_place(spec.device, list(spec.devices))} were asked for.",
            f"Ask for what runs, {stop}",
        )
    return record


def _place(device: str, devices: list[int]) -> str:
    return f"{device} {','.join(map(str, devices))}" if devices else device


def attach_or_start(
    spec: BackendSpec,
    waiting: Waiting = lambda seconds: None,
    serve: ServeSpec = LOCAL,
) -> BackendRecord:
    """The record of a backend that is ready; starts one, detached, where none of that name runs.

    Two callers at once start one backend: the second waits for the first.

    Args:
        waiting: called about four times a second with the seconds passed; what it raises ends the wait.
    Raises: StartError: it did not come up; the message has the end of its log.
    """
    with _start_lock(spec.name, waiting):
        record = find(spec)
        if record is None:
            process = start(spec, serve)
            record = wait_ready(spec, process, waiting)
    return record


def start(spec: BackendSpec, serve: ServeSpec = LOCAL) -> subprocess.Popen[bytes]:
    """torchrun in a session of its own, its output in the runtime folder's backend.log.

    Raises: ConfigError: more GPUs, or others, than there are.
    """
    check_devices(spec)
    folder = files.runtime_dir(spec.name)
    for left in ("backend.json", "last_good"):
        (folder / left).unlink(missing_ok=True)
    log = folder / "backend.log"
    if log.exists():
        log.replace(folder / "backend.previous.log")
    with log.open("wb") as output:
        return subprocess.Popen(
            command(spec, serve),
            env=environment(spec),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def check_devices(spec: BackendSpec) -> None:
    """Raises ConfigError where `spec` names GPUs that this machine doesn't have."""
    if spec.device != "cuda":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = spec.devices or tuple(range(spec.world_size))
    if absent := [ordinal for ordinal in wanted if not 0 <= ordinal < count]:
        raise ConfigError(
            f"GPUs {', '.join(map(str, absent))} were asked for; torch sees {count} here.",
            "Use fewer ranks, other devices, or device 'cpu'.",
        )


# glibc hands large freed blocks back to the kernel at once; to fault them in again takes up to a fifth of a step.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def command(spec: BackendSpec, serve: ServeSpec = LOCAL) -> list[str]:
    """The torchrun command of a backend on this host."""
    hosts = serve.hosts
    meeting = ["--standalone", f"--max-restarts={MAX_RESTARTS}"]
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
        *("-m", "parallel_backend.server"),
        *("--name", spec.name, "--device", spec.device, "--devices", ",".join(map(str, spec.devices))),
        *("--idle-seconds", str(spec.idle_seconds), "--memory-budget", str(spec.memory_budget)),
        *(part for name, value in options if value for part in (name, value)),
    ]


def supervise(spec: BackendSpec, serve: ServeSpec) -> int:
    """One host's part of a backend of several, started anew, on every host alike, whenever it falls; its exit status.

    Hosts meet again in their own time: each waits at the rendezvous, and a start in vain makes the next pause longer.
    """
    env = environment(spec) | {"PARALLEL_MMDIT_AGENT_PID": str(os.getpid())}
    if serve.hosts.interface:
        env |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), serve.hosts.interface)
    in_vain = 0
    while True:
        begun = time.monotonic()
        status = subprocess.run(command(spec, serve), env=env, check=False).returncode
        if status == 0:
            return 0
        in_vain = 0 if time.monotonic() - begun > GOOD_SECONDS else in_vain + 1
        if in_vain > STARTS_IN_VAIN:
            return status
        pause = min(LONGEST_PAUSE, 2.0**in_vain)
        print(f"The ranks of host {serve.hosts.index} fell; they are started again in {pause:.0f} s.", file=sys.stderr)
        time.sleep(pause)


def environment(spec: BackendSpec) -> dict[str, str]:
    """This process's environment, with the package importable and the cores shared out among CPU ranks."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), env.get("PYTHONPATH", "")]))
    env["PARALLEL_MMDIT_RUNTIME_DIR"] = str(files.runtime_root())
    if spec.device == "cpu":
        cores = len(os.sched_getaffinity(0))
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores // spec.world_size)))
        env = KEEP_FREED_MEMORY | env
    return env


def wait_ready(spec: BackendSpec, process: subprocess.Popen[bytes] | None, waiting: Waiting) -> BackendRecord:
    """The record, once every rank has acknowledged.

    Args:
        process: the starter's own torchrun, or None where ranks are being restarted by a torchrun that lives.
    Raises: StartError: torchrun ended, or nothing came within START_SECONDS.
    """
    begun = time.monotonic()
    while (record := files.read_record(spec.name)) is None:
        passed = time.monotonic() - begun
        if process is not None and (process.poll() is not None or _RANK_FAILED in files.log_tail(spec.name, 200)):
            raise _start_error(spec, process, "ended while it started")
        if passed > START_SECONDS:
            raise _start_error(spec, process, f"was not ready after {passed:.0f} s")
        try:
            waiting(passed)
        except BaseException:
            _end(process)
            raise
        time.sleep(0.25)
    return record


def _start_error(spec: BackendSpec, process: subprocess.Popen[bytes] | None, what: str) -> StartError:
    words = files.log_tail(spec.name)
    _end(process)
    return StartError(
        f"Backend {spec.name!r} {what}. Its log ends:\n{words}",
        f"The whole log is {files.runtime_dir(spec.name) / 'backend.log'}.",
    )


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """No rank of a start that failed stays behind."""
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _start_lock(name: str, waiting: Waiting) -> Iterator[None]:
    with (files.runtime_dir(name) / "lock").open("w") as lock:
        begun = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting(time.monotonic() - begun)
                time.sleep(0.25)
        yield
