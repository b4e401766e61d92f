"""One rank of a backend, run by torchrun. Rank 0 serves the socket; all ranks run each job alike.

A job that fails with a BackendError fails alike on every rank, and the backend goes on. After any other exception it does
so too where every rank failed at the same place; else ranks are out of step: this one leaves its last words and ends, and
torchrun starts all ranks anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NoReturn

import msgspec
import torch.distributed as dist
from torch import Tensor

from ..config import DEFAULT_IDLE_SECONDS
from ..distributed.links import measure_links
from ..errors import BackendError, BackendLostError, CancelledError, OutOfMemoryError, RankError, StartError
from ..rpc import runtime_dir as files
from ..rpc.headers import RequestHeader
from ..rpc.keys import Keys
from ..rpc.messages import (
    Adjust,
    Decode,
    Done,
    Encode,
    Failed,
    Forward,
    LoadControl,
    Loaded,
    LoadModel,
    LoadVAE,
    Reply,
    Request,
    Sample,
    Unload,
    Welcome,
)
from ..rpc.own_code import LOADED
from ..rpc.state import RankState
from ..rpc.wire import Sendable, unpack
from ..serving.metrics import serve_metrics
from ..serving.socket_server import SocketServer
from ..serving.state_board import StateBoard
from ..serving.turns import QueuedJob, own_job
from ..version import __version__
from . import lean_imports  # noqa: F401 - before anything that imports diffusers
from .allowed_files import AllowedFiles
from .engine import Engine, is_compiled
from .jobs import Job, cancelled_by_client
from .place import own_device, rank_state
from .pulse import COMPILING_SECONDS, STILL_SECONDS, Pulse
from .shared_tensors import laid
from .watch import Watch
from .world import meet, restart_count

log = logging.getLogger("parallel_backend")
_STOP = b"stop"
STOPPED_REMEDY = "Run the prompt again: it is started anew."
LOG_BYTES, LOG_FILES = 8 * 2**20, 3
# Before ranks that fell without having finished a job are tried again: at once, then after so many seconds.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# After the idle time the models leave; after so many times as long, or so many seconds, the processes end.
LINGERS, LONGEST_LINGER = 8, 4 * 3600.0


def pause_before(restarts: int, last_good: int) -> float:
    """Seconds to wait before start number `restarts`, when the last one that finished a job was `last_good`."""
    in_vain = restarts - last_good - 1
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(in_vain - 1, 10)) if in_vain > 0 else 0.0


def ends_after(idle: float) -> float:
    """Seconds without a job after which the processes end, where the models leave after `idle`."""
    return max(idle, min(LINGERS * idle, LONGEST_LINGER))


class Rank:
    """This process: its engine, its line to the other ranks and, on rank 0, the socket."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device, sharers = own_device(args.device, args.devices)
        if int(os.environ["RANK"]) == 0 and (pause := pause_before(restart_count(), files.last_good(args.name))):
            log.warning("start %d in a row: waiting %.0f s", restart_count() + 1, pause)
            time.sleep(pause)
        try:
            self.control = meet(self.device, self._give_up, self._note_stage)
        except StartError as error:
            self._give_up(error)
        files_of = AllowedFiles(tuple(args.models))
        patches = files.patches_folder()
        self.engine = Engine(self.device, args.memory_budget, files_of, sharers, lambda: self.pulse.beat(), patches)
        self.pulse = Pulse(self.device, lambda: self.control.calls + sum(self.engine.meshes.place))
        self.server: SocketServer | None = None
        self.board: StateBoard | None = None
        self.record: files.BackendRecord | None = None
        self._failing = threading.Lock()
        self._emptied = False

    def serve(self) -> None:
        """Serves until Stop or the idle time. All ranks acknowledge before the record says that they are ready."""
        rank, name = self.control.rank, self.args.name
        states = self.control.gather(rank_state(self.device, rank))
        watch = Watch(states, rank, self.pulse, self._on_fault)
        watch.start()
        if rank == 0:
            self._listen(states)
        while self._one_job():
            pass
        watch.stop()
        if self.server is not None:
            what = "The backend was stopped before this request's turn."
            self.server.close(Failed(BackendLostError.code, what, STOPPED_REMEDY))
            files.remove_record(name, os.getpid())
            log.info("stopped")

    def _listen(self, states: list[RankState]) -> None:
        """Rank 0's sockets, and the record that says that the backend is ready."""
        args, generation = self.args, uuid.uuid4().hex[:12]
        before = files.last_record(args.name) if restart_count() else None
        if before is not None:  # what these ranks had taken over before they fell
            args.idle_seconds = before.idle_seconds
        welcome = Welcome(generation, self.control.world_size, args.device)
        known = {"idle_seconds": args.idle_seconds, "memory_budget": args.memory_budget, "ranks": states}
        self.board = StateBoard(args.name, welcome, restarts=restart_count(), **known)
        address = f"ipc://{files.runtime_dir(args.name)}/socket"
        record = self.record = self._described(generation, address, [state.uuid for state in states])
        keys = Keys(args.keys) if args.keys else None
        addresses = [address, *([args.listen] if args.listen else [])]
        self.server = SocketServer(addresses, self.board, self._keep_record, keys)
        if args.metrics_port:
            serve_metrics(args.metrics_port, self.board, self.server.jobs)
        self.server.start()
        if before is not None and before.memory_budget != args.memory_budget:
            self._adjust(Adjust(before.idle_seconds, before.memory_budget))
        try:
            files.write_record(args.name, record)
        except (OSError, BackendError) as error:
            log.error("the record can't be written, and is tried again: %s", error)
        log.info("ready: %d ranks, generation %s, at %s", self.control.world_size, generation, ", ".join(addresses))

    def _adjust(self, settings: Adjust) -> None:
        """As where a client asks for it."""
        assert self.server is not None and self.board is not None
        self.board.note(memory_budget=settings.memory_budget)
        self.server.jobs.put(own_job(settings))

    def _described(self, generation: str, address: str, cards: list[str]) -> files.BackendRecord:
        """What others find of this backend in its runtime folder."""
        args, pid, agent = self.args, os.getpid(), _agent_pid()
        return files.BackendRecord(
            __version__,
            generation,
            pid,
            agent,
            address,
            self.control.world_size,
            args.device,
            devices=[int(d) for d in args.devices.split(",")] if args.devices else [],
            start_ticks=files.start_ticks(pid),
            agent_ticks=files.start_ticks(agent),
            cards=cards,
            environment=json.loads(os.environ.get(files.STARTED_WITH, "{}")),
            code=LOADED,
            idle_seconds=args.idle_seconds,
            memory_budget=args.memory_budget,
            models=[str(folder) for folder in args.models],
            listen=args.listen,
            keys=str(args.keys or ""),
            metrics_port=args.metrics_port,
            foreground=args.foreground,
        )

    def _keep_record(self) -> None:
        if self.record is not None:
            files.keep_record(self.args.name, self.record)

    def _one_job(self) -> bool:
        queued = self._next_job() if self.server is not None else None
        if queued is not None and queued.cancelled.is_set():
            self._give_up_waiting(queued)
            return True
        frames = None if self.server is None else queued.frames if queued is not None else [memoryview(_STOP)]
        frames = self.control.hand_on(frames)
        if len(frames) == 1 and frames[0] == _STOP:
            return False
        self._run(queued, frames)
        return True

    def _next_job(self) -> QueuedJob | None:
        """On rank 0: the next job; after the idle time, that all models leave; None where it is time to end."""
        assert self.server is not None
        idle = self.args.idle_seconds if self.record is None else self.record.idle_seconds
        last = ends_after(idle)
        try:
            queued = self.server.jobs.get(last - idle if self._emptied else idle)
        except queue.Empty:
            if self._emptied or last <= idle:
                log.info("idle for %.0f s", last)
                return None
            log.info("idle for %.0f s: the models leave", idle)
            self._emptied = True
            return own_job(Unload())
        self._emptied = False
        return queued

    def _give_up_waiting(self, queued: QueuedJob) -> None:
        """A job that was cancelled before its turn is answered; the other ranks never hear of it."""
        assert self.board is not None
        self.board.count_job(failed=True)
        log.info("job %s was cancelled before its turn", queued.label)
        self._finish(queued, self._failed(cancelled_by_client(), "A job that waited"), [])

    def _run(self, queued: QueuedJob | None, frames: list[memoryview]) -> None:
        board, kind, label, start, level = self.board, "?", "?", time.perf_counter(), logging.INFO
        results: Sequence[Sendable]

        def cancelled() -> bool:
            return queued is not None and queued.cancelled.is_set()

        def asked() -> bool:
            """At each step, block and tensor: so that the job moves."""
            self.pulse.beat()
            return cancelled()

        def emit(body: Reply, tensors: Sequence[Tensor]) -> None:
            if board is not None:
                board.tell(body)
            if self.server is not None and queued is not None:
                self.server.send(queued, body, tensors, final=False)

        job = Job(self.control, emit, asked)
        self.pulse.begin("a job", cancelled)
        try:
            # Read once more on every rank: rank 0 has checked the same frames before it queued them.
            header, tensors = unpack(frames, RequestHeader)
            kind = type(header.body).__name__
            self.pulse.begin(kind, cancelled, COMPILING_SECONDS if is_compiled(header.body) else STILL_SECONDS)
            label = queued.label if queued is not None else str(header.job)
            if board is not None:
                board.begin(kind, self._file_of(header.body), queued.sender if queued is not None else "")
            level = logging.DEBUG if kind == Forward.__name__ else logging.INFO  # many in a row, one after each step
            log.log(level, "job %s: %s begins", label, kind)
            body, given = self.engine.handle(header, tensors, job)
            results = laid(header.room, given) if queued is not None else []
            if isinstance(header.body, Adjust):
                self._take_over(header.body)
        except BackendError as error:
            body, results = self._failed(error, kind), []
        except Exception as error:
            named = self.control.verdict(error, self.engine.meshes.place)
            if named is None:
                raise
            body, results = self._failed(named, kind), []
            self.engine.residents.let_go_of_graphs()
        seconds = time.perf_counter() - start
        if board is not None and queued is not None and queued.client:
            board.count_job(isinstance(body, Failed))
        self._tell(queued, kind, body, results)
        log.log(level, "job %s: %s took %.3f s", label, kind, seconds)
        self.pulse.end()

    def _file_of(self, body: Request) -> str:
        """The name of the file that a job works with; empty where it has none."""
        if isinstance(body, (LoadModel, LoadVAE, LoadControl)):
            return Path(body.paths[0] if isinstance(body, LoadVAE) else body.path).name
        if not isinstance(body, (Sample, Forward, Decode, Encode)):
            return ""
        resident = self.engine.residents.get(body.vae if isinstance(body, (Decode, Encode)) else body.model)
        return "" if resident is None else resident.state.name

    def _take_over(self, settings: Adjust) -> None:
        """Who starts this backend again as it was, starts it so."""
        record = self.record
        if record is None:
            return
        settings = settings.on(record.idle_seconds, record.memory_budget)
        changes = {"idle_seconds": settings.idle_seconds, "memory_budget": settings.memory_budget}
        self.record = msgspec.structs.replace(record, **changes)
        with suppress(OSError, BackendError):
            files.write_record(self.args.name, self.record)

    def _tell(self, queued: QueuedJob | None, kind: str, body: Reply, results: Sequence[Sendable]) -> None:
        """The end of a job, to its client and to whoever asks for the state."""
        board = self.board
        if board is not None:
            kept, models = self.engine.kept_tensors, [resident.told for resident in self.engine.residents.values()]
            board.end(body, models=models, cached_tensors=len(kept), cached_bytes=kept.nbytes)
        # What is resident has changed: a status asked for after the reply must tell so. Other replies need not wait.
        changed = isinstance(body, (Loaded, Done))
        if not changed:
            self._finish(queued, body, results)
        if kind != Forward.__name__:  # many in a row, each waited for, and they leave all as it was
            states = self.control.gather(rank_state(self.device, self.control.rank))
            if board is not None:
                board.note(ranks=states)
        if changed:
            self._finish(queued, body, results)
        if board is not None:
            with suppress(OSError, BackendError):  # a full disk costs at most a pause
                files.note_good(self.args.name, restart_count())

    def _failed(self, error: BackendError, kind: str) -> Failed:
        if isinstance(error, CancelledError) and self.server is not None and self.server.jobs.ended:
            error = BackendLostError("The backend was stopped while this job ran.", STOPPED_REMEDY)
        level = logging.INFO if isinstance(error, CancelledError) else logging.WARNING
        log.log(level, "%s failed: %s", kind, error)
        return Failed(error.code, error.message, error.remedy, error.details)

    def _finish(self, queued: QueuedJob | None, body: Reply, results: Sequence[Sendable]) -> None:
        if self.server is not None and queued is not None:
            self.server.send(queued, body, results, final=True)

    def _on_fault(self, error: RankError) -> None:
        """The watch has seen what this process can't go on from, while it may be stuck in a collective."""
        self.fail(error)
        if self.server is not None and self.server.jobs.ended:  # a stop was asked for: torchrun must not start anew
            files.remove_record(self.args.name, os.getpid())
            os.kill(_agent_pid(), signal.SIGTERM)
        os._exit(1)

    def _note_stage(self, stage: str) -> None:
        with suppress(OSError, BackendError):
            files.note_stage(self.args.name, int(os.environ["RANK"]), stage)

    def _give_up(self, error: StartError) -> NoReturn:
        """Ranks don't meet. The starter reads these words: no client is connected yet."""
        log.error("this rank ends: %s", error)
        with suppress(OSError, BackendError):
            files.note_last_words(self.args.name, int(os.environ["RANK"]), error.brief)
        os._exit(1)

    def fail(self, error: Exception) -> None:
        """Leaves this rank's last words and tells the waiting clients, as far as they can still be told."""
        if not self._failing.acquire(blocking=False):
            time.sleep(10)  # the other thread is at it, and ends the process
        named = self.control.named(error)
        log.error("this rank ends: %s", named)
        with suppress(OSError, BackendError):
            files.note_last_words(self.args.name, self.control.rank, named.brief)
        if self.server is not None:
            time.sleep(0.5)  # the rank that failed first may be another one, and its words are the better ones
            first = files.last_words(self.args.name, time.time() - 5)
            remedy = "The ranks are being restarted and load the model again; run the prompt again."
            if self.server.jobs.ended:
                remedy = "The backend was stopped; run the prompt again to start it anew."
            code = named.code if isinstance(named, OutOfMemoryError) else RankError.code
            words = f"A rank failed: {(first or named.brief).rstrip('.')}."
            self.server.close(Failed(code, words, remedy, named.details))


def _agent_pid() -> int:
    """Of the process whose end is the backend's: torchrun's, or of `serve` on several hosts, which starts torchrun anew."""
    return int(os.environ.get("PARALLEL_MMDIT_AGENT_PID", os.getppid()))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="parallel_backend.rank.server", description=__doc__)
    parser.add_argument("--name", default="default")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--devices", default="", help="CUDA ordinals, one per rank, separated by commas")
    parser.add_argument("--idle-seconds", type=float, default=DEFAULT_IDLE_SECONDS)
    parser.add_argument("--memory-budget", type=int, default=0, help="bytes per rank for models; 0 is no limit")
    parser.add_argument("--models", type=Path, action="append", default=[], help="only files below these are opened")
    parser.add_argument("--listen", default="", help="tcp:// address beside the local socket; needs --keys")
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--metrics-port", type=int, default=0)
    parser.add_argument("--foreground", action="store_true", help="it belongs to the `serve` that started it")
    parser.add_argument("--only-meet", action="store_true", help="end once every rank has heard every other")
    parser.add_argument(
        "--measure-links", type=Path, help="time messages of each kind first; rank 0 writes them to this file"
    )
    return parser.parse_args(argv)


def start_logging(name: str, rank: int) -> None:
    """Each rank writes a file of its own, which is renamed when it is full; what is serious goes to the common log too."""
    form = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    common = logging.StreamHandler(sys.stderr)
    common.setLevel(logging.INFO if rank == 0 and restart_count() == 0 else logging.WARNING)
    own = RotatingFileHandler(files.runtime_dir(name) / f"rank{rank}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES)
    for handler in (common, own):
        handler.setFormatter(form)
    logging.basicConfig(level=logging.INFO, handlers=[common, own])
    logging.raiseExceptions = False  # a full disk must not end a job


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    start_logging(args.name, int(os.environ["RANK"]))
    # What was imported stays: looking through all of it for garbage takes a tenth of a second, each time a model leaves.
    gc.freeze()
    rank = Rank(args)
    try:
        if args.measure_links is not None:
            write_links(rank, args.measure_links)
        if not args.only_meet:
            rank.serve()
    except Exception as error:  # noqa: BLE001 - the ranks are out of step: end this one, torchrun starts all anew
        rank.fail(error)
        os._exit(1)
    rank.engine.residents.let_go_of_graphs()  # NCCL waits for those that know its communicators
    _leave(on_gpu=rank.device.type == "cuda")


def write_links(rank: Rank, file: Path) -> None:
    """Comm: `measure_links`'."""
    times = measure_links(rank.device)
    if rank.control.rank == 0:
        file.write_text(json.dumps(times))


def _leave(on_gpu: bool) -> NoReturn:
    """Ends this process, and with it no more than has to end.

    At a usual exit threads of libraries can abort it, which torchrun takes for a lost rank: it would start a stopped backend anew.
    """
    if on_gpu:
        dist.destroy_process_group()
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
