"""The soak: clients that come and go ask a backend for everything it does, for as long as is wished.

Every request must get exactly one final reply, every picture must be the one that a quiet backend makes, and the ranks must
hold in the end what they held before.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..client.backend import Backend
from ..client.remote import RemoteModel, Step
from ..config import MeshSpec
from ..distributed.device_memory import anonymous_bytes
from ..errors import BackendError, CancelledError, CheckpointError, ConfigError, InputError
from ..rpc.conditioning import Conditioning
from ..small_checkpoints.mmdit import small_config, write_mmdit
from ..small_checkpoints.prompts import random_prompt
from ..small_checkpoints.taesd import write_taesd

SIZES = [(1, 16, 16, 16), (2, 16, 16, 16), (1, 16, 18, 24)]
MESHES = [MeshSpec(cfg=2), MeshSpec(ulysses=2), MeshSpec(ring=2), MeshSpec(tp=2), MeshSpec(pp=2)]


@dataclass(frozen=True)
class Holding:
    """What a process has of its machine."""

    rss_anon: int
    descriptors: int
    threads: int
    shared_memory: int

    @classmethod
    def of(cls, pid: int) -> Holding:
        maps = Path(f"/proc/{pid}/map_files")
        shared = sum(1 for entry in maps.iterdir() if _target(entry).startswith("/dev/shm")) if os.getuid() == 0 else 0
        descriptors, threads = (len(os.listdir(f"/proc/{pid}/{folder}")) for folder in ("fd", "task"))
        return cls(anonymous_bytes(pid), descriptors, threads, shared)


def _target(entry: Path) -> str:
    with suppress(OSError):
        return os.readlink(entry)
    return ""


@dataclass
class Report:
    """What a soak has counted; `before` and `after` have a line for each rank."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    before: list[Holding] = field(default_factory=list)
    after: list[Holding] = field(default_factory=list)
    seconds: float = 0.0


class Soak:
    """The files, the references, and what a client may ask."""

    def __init__(self, folder: Path, backend: Backend, report: Report) -> None:
        self.report, self.name = report, backend.spec.name
        self.models = [
            write_mmdit(folder / f"{seed}.safetensors", small_config("sd3.5-large"), seed=seed) for seed in (0, 1)
        ]
        self.vae = write_taesd(folder, "taesd3", 16)
        self.prompts = [Conditioning(*random_prompt(seed, length)) for seed, length in ((1, 77), (2, 30))]
        self.references: dict[tuple[object, ...], Tensor] = {}
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.report.done[what] += 1

    def fault(self, words: str) -> None:
        with self._lock:
            self.report.wrong.append(words)

    def choice(self, rng: random.Random) -> tuple[int, MeshSpec, int, int]:
        """A model, a mesh, a size and a prompt."""
        return rng.randrange(2), rng.choice(MESHES), rng.randrange(len(SIZES)), rng.randrange(len(self.prompts))

    def sample(self, backend: Backend, chosen: tuple[int, MeshSpec, int, int], **settings: object) -> Tensor:
        number, mesh, size, prompt = chosen
        model = backend.load_model(self.models[number], mesh, "float32")
        return self._sample(model, size, prompt, **settings)

    def _sample(self, model: RemoteModel, size: int, prompt: int, **settings: object) -> Tensor:
        chosen = {"seed": 1, "steps": 2} | settings
        return model.sample(torch.zeros(SIZES[size]), self.prompts[prompt], self.prompts[0], **chosen)  # type: ignore[arg-type]

    def refer(self, backend: Backend) -> None:
        """Every picture that clients may ask for, made while nothing else runs."""
        for number in range(2):
            for mesh in MESHES:
                model = backend.load_model(self.models[number], mesh, "float32")
                for size in range(len(SIZES)):
                    for prompt in range(len(self.prompts)):
                        self.references[number, mesh, size, prompt] = self._sample(model, size, prompt)

    # -- what a client does -------------------------------------------------------------------------------------

    def picture(self, backend: Backend, rng: random.Random) -> None:
        chosen = self.choice(rng)
        if not torch.equal(self.sample(backend, chosen), self.references[chosen]):
            self.fault(f"another picture than in quiet: {chosen}")

    def cancelled(self, backend: Backend, rng: random.Random) -> None:
        last, seen = rng.randrange(4), [0]

        def on_step(step: Step) -> None:
            seen[0] = step.index

        try:
            self.sample(backend, self.choice(rng), steps=2000, on_step=on_step, should_cancel=lambda: seen[0] >= last)
            self.fault("a cancelled job ended")
        except CancelledError:
            pass

    def decoded(self, backend: Backend, rng: random.Random) -> None:
        vae = backend.load_vae(self.vae, "float32")
        image = vae.decode(torch.zeros(1, 16, rng.choice((4, 5, 16)), 8))
        if not torch.isfinite(image).all():
            self.fault("a decoded image holds NaN")

    def bad(self, backend: Backend, rng: random.Random) -> None:
        try:
            model = backend.load_model(self.models[0], MESHES[0], "float32")
            kind = rng.randrange(3)
            if kind == 0:
                model.sample(torch.zeros(1, 4, 8, 8), self.prompts[0])
            elif kind == 1:
                backend.load_model(self.models[0], MeshSpec(tp=3))
            else:
                backend.load_model(self.vae[1], MeshSpec(tp=2))
            self.fault("bad input was taken")
        except (InputError, ConfigError, CheckpointError):
            pass

    def freed(self, backend: Backend, rng: random.Random) -> None:
        backend.unload()

    def client(self, seed: int, until: float) -> None:
        """Jobs of one client after another, until the time is over."""
        rng = random.Random(seed)
        acts: list[Callable[[Backend, random.Random], None]] = [self.picture] * 6
        acts += [self.cancelled, self.cancelled, self.decoded, self.bad, self.freed]
        while time.monotonic() < until:
            backend = Backend.attach(self.name)
            try:
                for _ in range(rng.randrange(1, 12)):
                    act = rng.choice(acts)
                    act(backend, rng)
                    self.count(act.__name__)
            except BackendError as error:
                self.fault(f"{type(error).__name__}: {error}")
            finally:
                backend.close()


def run_soak(minutes: float, clients: int = 3, warm_up_seconds: float = 10.0) -> Report:
    """Runs and counts. Nothing is asserted here: `Report` has what came of it."""
    report, name = Report(), f"soak{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="pms-") as folder:
        backend = Backend(2, "cpu", name, memory_budget=96 * 2**20)
        try:
            soak = Soak(Path(folder), backend, report)
            soak.refer(backend)
            _clients(soak, clients, warm_up_seconds)  # so that all that is kept on purpose has been made
            report.before = _holdings(backend)
            report.done.clear()
            begun = time.monotonic()
            _clients(soak, clients, minutes * 60)
            report.seconds, report.after = time.monotonic() - begun, _holdings(backend)
            state = backend.status()
            if state.restarts or state.queued or state.running or state.refused:
                soak.fault(f"left behind: {state}")
        finally:
            backend.stop()
    return report


def _clients(soak: Soak, count: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=soak.client, args=(seed, until)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 120)
        if thread.is_alive():
            soak.fault("a request got no reply")


def _holdings(backend: Backend) -> list[Holding]:
    backend.unload()
    time.sleep(1.0)
    return [Holding.of(rank.pid) for rank in backend.status().ranks]


def print_soak(minutes: float, clients: int) -> bool:
    """Prints the report; whether nothing was wrong."""
    report = run_soak(minutes, clients)
    print(
        f"{sum(report.done.values())} requests of {clients} clients in {report.seconds:.0f} s, each with one final reply"
    )
    print("  " + ", ".join(f"{count} {what}" for what, count in sorted(report.done.items())))
    for rank, (before, after) in enumerate(zip(report.before, report.after, strict=True)):
        anon = f"RssAnon {before.rss_anon / 2**20:.1f} -> {after.rss_anon / 2**20:.1f} MiB"
        files = f"descriptors {before.descriptors} -> {after.descriptors}"
        rest = f"threads {before.threads} -> {after.threads}, shared memory {before.shared_memory} -> {after.shared_memory}"
        print(f"  rank {rank}: {anon}, {files}, {rest}")
    for words in report.wrong:
        print(f"  WRONG: {words}")
    return not report.wrong
