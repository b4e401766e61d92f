"""The fault table: what is done to a backend of two ranks, and what its user then sees.

Everything here is real: processes are killed and stopped, memory is limited, files and sockets are taken away.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from ..client.backend import Backend
from ..client.remote import RemoteModel, Step
from ..config import MeshSpec
from ..errors import BackendError, ConfigError, RankError
from ..rpc import runtime_dir as files
from ..rpc.conditioning import Conditioning
from ..small_checkpoints.mmdit import small_config, write_mmdit
from ..small_checkpoints.prompts import random_prompt

GIVE_UP_SECONDS = 60.0
# What the ranks of this table's backend do at a signal: nothing else makes a thread sleep from outside.
SLEEP = signal.SIGUSR1
_AT_START = """
import os, signal, time
if "RANK" in os.environ:
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1e6))
"""
SETTLE_SECONDS = 2.5
_SMALL, _LARGE = (1, 16, 16, 16), (8, 16, 128, 128)


@dataclass
class Stage:
    """A backend, a model in it, and the picture that it makes when nothing is wrong."""

    backend: Backend
    model: RemoteModel
    checkpoint: Path
    expected: Tensor = field(init=False)
    struck: float = field(init=False, default=0.0)
    given_up: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.expected = self.sample()

    def sample(self, model: RemoteModel | None = None, **settings: object) -> Tensor:
        positive, negative = (Conditioning(*random_prompt(seed, 77)) for seed in (1, 2))
        chosen = {"seed": 1, "steps": 3} | settings
        return (model or self.model).sample(torch.zeros(_SMALL), positive, negative, **chosen)  # type: ignore[arg-type]

    def sample_and(self, strike: Callable[[], object], steps: int = 1000) -> None:
        """Strikes in the middle of a job and waits for how it ends."""
        self.struck, self.given_up = 0.0, False

        def on_step(step: Step) -> None:
            if step.index == 2:
                self.struck = time.monotonic()
                strike()

        self.sample(steps=steps, on_step=on_step, should_cancel=self._waited_long)

    def _waited_long(self) -> bool:
        return self.given_up or (bool(self.struck) and time.monotonic() - self.struck > GIVE_UP_SECONDS)

    def pid(self, rank: int) -> int:
        return self.backend.status().ranks[rank].pid


@dataclass(frozen=True)
class Fault:
    """`act` strikes, and raises what the user sees; `mend` is what a person would have to do, before the next prompt."""

    name: str
    act: Callable[[Stage], None]
    error: str
    mend: Callable[[Stage], None] = lambda stage: None


@dataclass(frozen=True)
class Row:
    """What came of a fault. `detected` is None where no job was to fail."""

    fault: str
    detected: float | None
    error: str
    code: str
    recovered: float
    equal: bool
    restarted: bool


def signalled(rank: int, number: signal.Signals) -> Callable[[Stage], None]:
    def act(stage: Stage) -> None:
        pid = stage.pid(rank)
        stage.sample_and(lambda: os.kill(pid, number))

    return act


def asleep_and(then: Callable[[Stage], object]) -> Callable[[Stage], None]:
    """Rank 1 falls asleep for ever between two steps, as one would that waits for a lock or a link; the others wait for it in
    a collective."""

    def act(stage: Stage) -> None:
        pid = stage.pid(1)

        def strike() -> None:
            os.kill(pid, SLEEP)
            then(stage)

        stage.sample_and(strike)

    return act


def cancel(stage: Stage) -> None:
    stage.given_up = True


def stop(stage: Stage) -> None:
    """By somebody else, while the job waits."""
    Thread(target=lambda: Backend.attach(stage.backend.spec.name).stop()).start()


def torchrun_killed(stage: Stage) -> None:
    stage.sample_and(lambda: os.kill(stage.backend.record.agent_pid, signal.SIGKILL))


def out_of_memory(ranks: Sequence[int]) -> Callable[[Stage], None]:
    """A larger image than the address space of these ranks has room for."""

    def act(stage: Stage) -> None:
        prompt = Conditioning(*random_prompt(1, 77))
        pids = [stage.pid(rank) for rank in ranks]
        for pid in pids:
            held = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.prlimit(pid, resource.RLIMIT_AS, (held + 96 * 2**20, resource.RLIM_INFINITY))
        stage.struck = time.monotonic()
        try:
            stage.model.sample(torch.zeros(_LARGE), prompt, prompt, steps=2, should_cancel=stage._waited_long)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return act


def client_killed(stage: Stage) -> None:
    """Another process asks for a long job and dies; its job must not keep the ranks."""
    code = (
        "import os, sys, torch; from parallel_backend import *\n"
        "from parallel_backend.small_checkpoints.prompts import random_prompt\n"
        "model = Backend.attach(sys.argv[1]).load_model(sys.argv[2], MeshSpec(cfg=2), 'float32')\n"
        "prompt = Conditioning(*random_prompt(1, 77))\n"
        "model.sample(torch.zeros(1, 16, 16, 16), prompt, prompt, steps=10000,\n"
        "             on_step=lambda step: step.index == 2 and os.kill(os.getpid(), 9))"
    )
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", code, stage.backend.spec.name, str(stage.checkpoint)]
    subprocess.run(command, cwd=root, check=False)
    stage.struck = time.monotonic()
    while stage.backend.status().running:
        if stage._waited_long():
            raise RankError("The job of a client that is gone still runs.", "")
        time.sleep(0.1)


def removed(what: Callable[[Stage], Path]) -> Callable[[Stage], None]:
    """A file or folder vanishes in the middle of a job, which goes on."""

    def act(stage: Stage) -> None:
        path = what(stage)
        stage.sample_and(lambda: shutil.rmtree(path) if path.is_dir() else path.unlink(), steps=40)
        time.sleep(SETTLE_SECONDS)
        other = Backend.attach(stage.backend.spec.name)  # by a new client, which needs what was removed
        other.status()
        other.close()

    return act


def checkpoint_moved(stage: Stage) -> None:
    """The file goes while its model is resident: nothing happens, until the model must be read again."""
    away = stage.checkpoint.with_suffix(".away")
    stage.sample_and(lambda: stage.checkpoint.rename(away), steps=40)
    stage.backend.unload([stage.model.name])
    stage.struck = time.monotonic()
    stage.sample()


def checkpoint_back(stage: Stage) -> None:
    stage.checkpoint.with_suffix(".away").replace(stage.checkpoint)


def checkpoint_replaced(stage: Stage) -> None:
    """Other weights under the same name must not be taken for those that were asked for."""
    shutil.copy2(stage.checkpoint, stage.checkpoint.with_suffix(".away"))
    write_mmdit(stage.checkpoint, small_config("sd3.5-large"), seed=9)
    stage.backend.unload([stage.model.name])
    stage.struck = time.monotonic()
    stage.sample()


def disk_full(stage: Stage) -> None:
    """The runtime folder's disk is full when the ranks fall."""
    folder = files.runtime_dir(stage.backend.spec.name)
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))
    signalled(1, signal.SIGKILL)(stage)


def disk_empty(stage: Stage) -> None:
    (files.runtime_dir(stage.backend.spec.name) / "filling").unlink()


def _runtime(stage: Stage) -> Path:
    return files.runtime_dir(stage.backend.spec.name)


FAULTS = [
    Fault("rank 1 killed", signalled(1, signal.SIGKILL), "rank 1 was killed by signal 9|A rank failed"),
    Fault("rank 0 killed", signalled(0, signal.SIGKILL), "rank 0 was killed by signal 9|A rank failed"),
    Fault("rank 1 stopped", signalled(1, signal.SIGSTOP), "rank 1 .* was stopped"),
    Fault("rank 0 stopped", signalled(0, signal.SIGSTOP), "rank 0 .* was stopped"),
    Fault("rank 1 asleep", asleep_and(lambda stage: None), "no rank has moved for 40 s in Sample; .*NCCL_P2P_DISABLE"),
    Fault("rank 1 asleep, cancel", asleep_and(cancel), "The job was cancelled"),
    Fault("rank 1 asleep, stop", asleep_and(stop), "stopped|gone|ended|cancelled"),
    Fault("torchrun killed", torchrun_killed, "torchrun .* is gone"),
    Fault("out of memory on rank 1", out_of_memory([1]), "[Rr]ank 1 on cpu is out of memory: .* MiB more"),
    Fault("out of memory on all ranks", out_of_memory([0, 1]), "Rank 0 on cpu is out of memory: .* MiB more"),
    Fault("client killed", client_killed, ""),
    Fault("socket removed", removed(lambda stage: _runtime(stage) / "socket"), ""),
    Fault("runtime folder removed", removed(_runtime), ""),
    Fault("checkpoint removed", checkpoint_moved, "is not there", checkpoint_back),
    Fault("checkpoint replaced", checkpoint_replaced, "its content has changed", checkpoint_back),
    Fault("disk full, rank 1 killed", disk_full, "disk of .* is full", disk_empty),
]


def run_fault(stage: Stage, fault: Fault) -> Row:
    """Strikes, and asks for the usual picture again: once, as a person would queue the next prompt."""
    detected, text, code = None, "", ""
    generation = stage.backend.generation
    try:
        fault.act(stage)
    except BackendError as error:
        detected, text, code = time.monotonic() - stage.struck, str(error), error.code
    fault.mend(stage)
    begun = time.monotonic()
    try:
        equal = torch.equal(stage.sample(), stage.expected)
    except BackendError as error:
        equal, text = False, f"{text} THEN {error}"
    return Row(
        fault.name, detected, text, code, time.monotonic() - begun, equal, stage.backend.generation != generation
    )


@contextmanager
def small_disk() -> Iterator[Path]:
    """A folder for a runtime folder: on a disk of its own where this user may mount one, so that it can be filled."""
    with tempfile.TemporaryDirectory(prefix="pmf-") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", folder]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        try:
            yield Path(folder)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", folder], check=False)


def run_faults(names: Sequence[str] = (), report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """The rows of these faults, of all where none is named; one that can't be tried here is left out.

    Raises: ConfigError: no fault of that name.
    """
    known = [fault.name for fault in FAULTS]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"There is no fault {unknown[0]!r}.", f"Choose of: {', '.join(known)}.")
    with small_disk() as disk, tempfile.TemporaryDirectory(prefix="pmf-") as folder:
        (Path(folder) / "sitecustomize.py").write_text(_AT_START)
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
        with _environment(PARALLEL_MMDIT_RUNTIME_DIR=str(disk), PYTHONPATH=path):
            return list(_rows([f for f in FAULTS if f.name in (names or known)], Path(folder), disk, report))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _rows(faults: Sequence[Fault], models: Path, disk: Path, report: Callable[[Row], None]) -> Iterator[Row]:
    checkpoint = write_mmdit(models / "model.safetensors", small_config("sd3.5-large"))
    backend = Backend(2, "cpu", "faults")
    try:
        stage = Stage(backend, backend.load_model(checkpoint, MeshSpec(cfg=2), "float32"), checkpoint)
        for fault in faults:
            if fault.act is disk_full and not os.path.ismount(disk):
                continue
            row = run_fault(stage, fault)
            report(row)
            yield row
    finally:
        with suppress(BackendError):
            Backend.attach("faults").stop()


def print_faults(names: Sequence[str]) -> bool:
    """Prints the table; whether every picture was the expected one."""

    def report(row: Row) -> None:
        seen = "-" if row.detected is None else f"{row.detected:.1f} s"
        print(
            f"{row.fault:<28} {seen:>10} {row.recovered:>10.1f} s {row.equal!s:>6}  {row.error[:150] or 'no job fails'}"
        )

    print(f"{'fault':<28} {'seen after':>10} {'next done':>12} {'equal':>6}  error")
    rows = run_faults(names, report)
    if len(rows) < len(FAULTS) and not names:
        print("disk full: not tried, since this user can't mount a disk of its own")
    return all(row.equal for row in rows)
