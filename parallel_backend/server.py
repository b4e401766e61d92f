"""One rank of a backend, run by torchrun. Rank 0 serves the socket; all ranks run each job alike.

A job that fails with a BackendError fails alike on every rank, and the backend goes on. Any other exception may leave
ranks out of step: this rank leaves its last words and ends, and torchrun starts all ranks anew.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import msgspec
import torch
import torch.distributed as dist
import zmq
from torch import Tensor

from . import lean_imports  # noqa: F401 - before anything that imports diffusers
from .config import DEFAULT_IDLE_SECONDS
from .distributed.control import Control
from .engine import Engine
from .errors import BackendError, CancelledError, RankError
from .jobs import Job
from .rpc import runtime_dir as files
from .rpc.messages import (
    BackendState,
    Cancel,
    Done,
    Failed,
    Forward,
    Hello,
    Loaded,
    RankState,
    Reply,
    ReplyHeader,
    RequestHeader,
    Status,
    Stop,
    Welcome,
)
from .rpc.wire import MAX_FRAME_BYTES, Frame, pack, tensor_meta, unpack
from .version import __version__

log = logging.getLogger("parallel_backend")
_STOP = b"stop"


@dataclass
class QueuedJob:
    """A request that waits or runs, with who sent it. `cancelled` may be set by the socket's thread."""

    client: bytes
    number: int
    frames: list[memoryview]
    cancelled: threading.Event = field(default_factory=threading.Event)


class SocketServer(threading.Thread):
    """Rank 0's socket: takes requests into a queue, answers control messages at once, sends replies.

    Only this thread touches the ZeroMQ sockets; the computing thread hands replies over an in-process pair.
    """

    def __init__(self, address: str, state: StateBoard) -> None:
        super().__init__(name="socket", daemon=True)
        self.jobs: queue.Queue[QueuedJob | None] = queue.Queue()
        self.state = state
        self._open: dict[tuple[bytes, int], QueuedJob] = {}
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._router.setsockopt(zmq.LINGER, 1000)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        previous = os.umask(0o177)
        try:
            self._router.bind(address)
        finally:
            os.umask(previous)
        self._inside = self._context.socket(zmq.PULL)
        self._inside.bind("inproc://replies")
        self._outside = self._context.socket(zmq.PUSH)
        self._outside.connect("inproc://replies")

    # -- called by the computing thread -----------------------------------------------------------------------

    def send(self, client: bytes, job: int, body: Reply, tensors: Sequence[Tensor] = ()) -> None:
        header = ReplyHeader(job, body, [tensor_meta(t) for t in tensors])
        self._outside.send_multipart([client, *pack(header, [t.cpu() for t in tensors])], copy=False)

    def close(self) -> None:
        """Everything sent so far goes out, then the thread ends."""
        self._outside.send(_STOP)
        self.join(timeout=5)

    # -- the thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._inside, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._inside in ready:
                frames = self._inside.recv_multipart(copy=False)
                if len(frames) == 1 and frames[0].bytes == _STOP:
                    break
                self._router.send_multipart(frames, copy=False)
            if self._router in ready:
                self._receive()
        self._router.close()
        self._context.destroy(linger=1000)

    def _receive(self) -> None:
        client_frame, *frames = self._router.recv_multipart(copy=False)
        client = client_frame.bytes
        number = -1
        try:
            number = _job_number(frames[0].buffer if frames else b"")
            header, _ = unpack([frame.buffer for frame in frames], RequestHeader)
            self._take(client, header, [frame.buffer for frame in frames])
        except BackendError as error:
            self._answer(client, number, Failed(error.code, error.message, error.remedy))

    def _take(self, client: bytes, header: RequestHeader, frames: list[memoryview]) -> None:
        body = header.body
        if isinstance(body, Hello):
            self._answer(client, header.job, self.state.welcome)
        elif isinstance(body, Status):
            self._answer(client, header.job, self.state.snapshot(self.jobs.qsize()))
        elif isinstance(body, Cancel):
            if job := self._open.get((client, body.job)):
                job.cancelled.set()
            self._answer(client, header.job, Done())
        elif isinstance(body, Stop):
            self._answer(client, header.job, Done())
            for job in self._open.values():
                job.cancelled.set()
            self.jobs.put(None)
        else:
            job = QueuedJob(client, header.job, frames)
            self._open = {k: j for k, j in self._open.items() if not j.cancelled.is_set()} | {(client, header.job): job}
            self.jobs.put(job)

    def _answer(self, client: bytes, number: int, body: Reply) -> None:
        self._router.send_multipart([client, *pack(ReplyHeader(number, body), [])])


class _Numbered(msgspec.Struct):
    job: int = -1


def _job_number(frame: Frame) -> int:
    try:
        return msgspec.msgpack.decode(frame, type=_Numbered).job
    except (msgspec.DecodeError, msgspec.ValidationError):
        return -1


class StateBoard:
    """What `status` tells: written by the computing thread after each job, read by the socket's thread."""

    def __init__(self, name: str, welcome: Welcome) -> None:
        self.welcome = welcome
        self._started = time.monotonic()
        self._latest = BackendState(__version__, welcome.generation, name, 0.0, [], [], "", 0, 0, 0)

    def snapshot(self, queued: int) -> BackendState:
        return msgspec.structs.replace(self._latest, uptime=time.monotonic() - self._started, queued=queued)

    def note(self, **changes: object) -> None:
        self._latest = msgspec.structs.replace(self._latest, **changes)

    @property
    def jobs_done(self) -> int:
        return self._latest.jobs_done


def rank_state(device: torch.device, rank: int) -> RankState:
    """Where this rank runs and how much memory its device has."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        device_name, used = torch.cuda.get_device_name(device), torch.cuda.memory_reserved(device)
    else:
        pages = os.sysconf("SC_PAGE_SIZE")
        free, total = pages * os.sysconf("SC_AVPHYS_PAGES"), pages * os.sysconf("SC_PHYS_PAGES")
        device_name, used = f"{torch.get_num_threads()} threads", _anonymous_bytes()
    return RankState(rank, socket.gethostname(), os.getpid(), str(device), device_name, free, total, used)


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)


def join_world(backend: str) -> None:
    """The process group of all ranks that torchrun started this time.

    torchrun's store lives through restarts, and what ranks of an earlier start left there would be taken for this
    one's addresses: so each start has names of its own.
    """
    env = os.environ
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    agents = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, world_size, is_master=not agents and rank == 0)
    own = dist.PrefixStore(f"start-{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)


class Rank:
    """This process: its engine, its line to the other ranks and, on rank 0, the socket."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        local = int(os.environ["LOCAL_RANK"])
        if args.device == "cuda":
            ordinals = [int(d) for d in args.devices.split(",")] if args.devices else None
            self.device = torch.device("cuda", ordinals[local] if ordinals else local)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        join_world("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
        self.control = Control()
        self.engine = Engine(self.device, args.memory_budget)
        self.server: SocketServer | None = None
        self.board: StateBoard | None = None

    def serve(self) -> None:
        """Serves until Stop or the idle time. All ranks acknowledge before the record says that they are ready."""
        rank = self.control.rank
        name = self.args.name
        generation = uuid.uuid4().hex[:12]
        states = self.control.gather(rank_state(self.device, rank))
        if rank == 0:
            address = f"ipc://{files.runtime_dir(name)}/socket"
            self.board = StateBoard(name, Welcome(generation, self.control.world_size, self.args.device))
            self.board.note(ranks=states)
            self.server = SocketServer(address, self.board)
            self.server.start()
            devices = [int(d) for d in self.args.devices.split(",")] if self.args.devices else []
            record = files.BackendRecord(
                __version__,
                generation,
                os.getpid(),
                os.getppid(),
                address,
                self.control.world_size,
                self.args.device,
                devices,
            )
            files.write_record(name, record)
            log.info("ready: %d ranks, generation %s", self.control.world_size, generation)
        while self._one_job():
            pass
        if self.server is not None:
            self.server.close()
            (files.runtime_dir(name) / "backend.json").unlink(missing_ok=True)
            log.info("stopped")

    def _one_job(self) -> bool:
        queued: QueuedJob | None = None
        frames: list[memoryview] | None = None
        if self.server is not None:
            try:
                queued = self.server.jobs.get(timeout=self.args.idle_seconds)
            except queue.Empty:
                log.info("idle for %.0f s", self.args.idle_seconds)
            frames = queued.frames if queued else [memoryview(_STOP)]
        frames = self.control.hand_on(frames)
        if len(frames) == 1 and frames[0] == _STOP:
            return False
        self._run(queued, frames)
        return True

    def _run(self, queued: QueuedJob | None, frames: list[memoryview]) -> None:
        server, board = self.server, self.board

        def emit(body: Reply, tensors: Sequence[Tensor]) -> None:
            if server is not None and queued is not None:
                server.send(queued.client, queued.number, body, tensors)

        job = Job(self.control, emit, lambda: queued is not None and queued.cancelled.is_set())
        start = time.perf_counter()
        kind = "?"
        try:
            # Read once more on every rank: rank 0 has checked the same frames before it queued them.
            header, tensors = unpack(frames, RequestHeader)
            kind = type(header.body).__name__
            if board is not None:
                board.note(running=kind)
            job.check_cancelled()
            body, results = self.engine.handle(header, tensors, job)
        except BackendError as error:
            body, results = Failed(error.code, error.message, error.remedy), []
            log.log(
                logging.INFO if isinstance(error, CancelledError) else logging.WARNING, "%s failed: %s", kind, error
            )
        if board is not None:
            board.note(running="", jobs_done=board.jobs_done + 1, cached_tensors=self.engine.cached_tensors)
            log.info("%s took %.3f s", kind, time.perf_counter() - start)
        # What is resident has changed: a status asked for after the reply must tell so. Other replies need not wait.
        changed = isinstance(body, (Loaded, Done))
        if not changed:
            self._finish(queued, body, results)
        if kind != Forward.__name__:  # many in a row, each waited for, and they leave all as it was
            states = self.control.gather(rank_state(self.device, self.control.rank))
            if board is not None:
                board.note(ranks=states, models=[resident.state for resident in self.engine.residents.values()])
        if changed:
            self._finish(queued, body, results)

    def _finish(self, queued: QueuedJob | None, body: Reply, results: Sequence[Tensor]) -> None:
        if self.server is not None and queued is not None:
            self.server.send(queued.client, queued.number, body, results)
            queued.cancelled.set()  # nothing is left to cancel; the table forgets it

    def fail(self, error: BaseException) -> None:
        """Tells the waiting client, as far as it can still be told."""
        words = f"{type(error).__name__}: {error}"
        files.note_last_words(self.args.name, self.control.rank, words)
        traceback.print_exc()
        if self.server is not None:
            time.sleep(0.5)  # the rank that failed first may be another one, and its words are the better ones
            first = files.last_words(self.args.name, time.time() - 5)
            failed = Failed(
                RankError.code, f"A rank failed: {first}.", "The ranks are being restarted; run the prompt again."
            )
            for (client, number), job in list(self.server._open.items()):
                if not job.cancelled.is_set():
                    self.server.send(client, number, failed)
            self.server.close()


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="parallel_backend.server", description=__doc__)
    parser.add_argument("--name", default="default")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--devices", default="", help="CUDA ordinals, one per rank, separated by commas")
    parser.add_argument("--idle-seconds", type=float, default=DEFAULT_IDLE_SECONDS)
    parser.add_argument("--memory-budget", type=int, default=0, help="bytes per rank for models; 0 is no limit")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = parse_args(argv)
    rank_number = int(os.environ["RANK"])
    logging.basicConfig(
        level=logging.INFO if rank_number == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank_number} %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    with ExitStack() as stack:
        rank = Rank(args)
        stack.callback(dist.destroy_process_group)
        try:
            rank.serve()
        except Exception as error:  # noqa: BLE001 - the ranks are out of step: end this one, torchrun starts all anew
            rank.fail(error)
            os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
