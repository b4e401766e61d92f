"""Rank 0's socket: takes requests into a queue, answers control messages at once, sends replies.

Whatever comes in at the socket, this thread lives: what it can't read is refused to its sender.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq
from torch import Tensor
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from ..command_line import command_line
from ..errors import BackendError, ProtocolError
from ..rpc.headers import ReplyHeader, RequestHeader, TensorMeta
from ..rpc.keys import Keys
from ..rpc.messages import (
    Adjust,
    Cancel,
    Done,
    Failed,
    Forget,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Reply,
    Request,
    Status,
    Stop,
    StopUnused,
)
from ..rpc.wire import MAX_FRAME_BYTES, Frame, Sendable, pack, tensor_meta, unpack
from .clients import Clients
from .sent_keys import SentKeys
from .state_board import StateBoard
from .turns import QueuedJob, Turns, own_job

log = logging.getLogger("parallel_backend")

LOOK_ROUND_MS = 1000
# A client behind a cut link is given up after so long without a sign of life on its connection.
HEARTBEAT_MS, HEARTBEAT_LOST_MS = 2000, 8000
MOST_OPEN = 256
# What the computing thread's messages begin with.
_MORE, _FINAL, _FAIL_ALL, _STOP = b"more", b"final", b"fail all", b"stop"


class SocketServer(threading.Thread):
    """Only this thread touches the ROUTER and the table of open jobs; others hand it messages over an in-process pair.

    Args:
        addresses: ipc:// or tcp://; the latter only with keys.
        look_round: called about once a second, for what must be put right beside the socket.
        keys: clients over TCP must have them.
    """

    def __init__(
        self, addresses: Sequence[str], board: StateBoard, look_round: Callable[[], None], keys: Keys | None = None
    ) -> None:
        super().__init__(name="socket", daemon=True)
        self.jobs = Turns()
        self._addresses, self._board, self._look_round = list(addresses), board, look_round
        self._open: dict[tuple[bytes, int], tuple[QueuedJob, zmq.Socket[bytes]]] = {}
        self._sent_keys, self._clients = SentKeys(), Clients()
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._routers = {address: self._router(address, keys) for address in addresses}
        self._ends = [router.get_monitor_socket(zmq.EVENT_DISCONNECTED) for router in self._routers.values()]
        self._inside = self._context.socket(zmq.PULL)
        self._inside.bind("inproc://replies")
        self._outside = self._context.socket(zmq.PUSH)
        self._outside.connect("inproc://replies")
        self._outside_lock = threading.Lock()

    def _router(self, address: str, keys: Keys | None) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        router.setsockopt(zmq.LINGER, 1000)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if address.startswith("tcp://"):
            if keys is None:
                raise ProtocolError(
                    f"{address} can't be listened on without keys.",
                    f"Make some with `{command_line('keys', 'FOLDER')}`.",
                )
            self._authenticator = keys.guard(self._context, router)
            router.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            router.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_LOST_MS)
        _bind(router, address)
        return router

    # -- called by other threads ------------------------------------------------------------------------------

    def send(self, job: QueuedJob, body: Reply, tensors: Sequence[Sendable] = (), *, final: bool) -> None:
        header = ReplyHeader(job.number, body, [t if isinstance(t, TensorMeta) else tensor_meta(t) for t in tensors])
        kind, number = _FINAL if final else _MORE, str(job.number).encode()
        sent = [t for t in tensors if isinstance(t, Tensor)]
        self._hand_over([kind, job.client, number, *pack(header, sent)])

    def close(self, failed: Failed | None = None) -> None:
        """Everything sent so far goes out, and `failed` to whoever still waits; then the thread ends."""
        if failed is not None:
            self._hand_over([_FAIL_ALL, msgspec.msgpack.encode(failed)])
        self._hand_over([_STOP])
        if self.is_alive():  # a rank may fail before it has started to listen
            self.join(timeout=5)

    def _hand_over(self, frames: list[Frame]) -> None:
        with self._outside_lock:
            self._outside.send_multipart(frames, copy=False)

    # -- the thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._serve()
        except BaseException:  # without this thread nobody is heard: the ranks must be started anew
            log.exception("the socket's thread failed")
            os._exit(1)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self._inside, *self._routers.values(), *self._ends):
            poller.register(socket, zmq.POLLIN)
        next_look = time.monotonic()
        while True:
            ready = dict(poller.poll(LOOK_ROUND_MS))
            if self._inside in ready and not self._pass_on():
                break
            self._see_ends()
            for router in self._routers.values():
                if router in ready:
                    self._receive(router)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + LOOK_ROUND_MS / 1000
                self._mend()
        for router in self._routers.values():
            router.disable_monitor()
            router.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy(linger=1000)

    def _pass_on(self) -> bool:
        """Hands a message of the computing thread to its client; False where it is the last one."""
        kind, *frames = self._inside.recv_multipart(copy=False)
        if kind.bytes == _STOP:
            return False
        if kind.bytes == _FAIL_ALL:
            failed = msgspec.msgpack.decode(frames[0].buffer, type=Failed)
            for (client, number), (_, router) in list(self._open.items()):
                self._answer(router, client, number, failed)
            self._open.clear()
            return True
        client, number = frames[0].bytes, int(frames[1].bytes)
        if found := self._open.get((client, number)):
            self._send(found[1], client, frames[2:])
            if kind.bytes == _FINAL:
                self._open.pop((client, number))
        return True

    def _receive(self, router: zmq.Socket[bytes]) -> None:
        client_frame, *frames = router.recv_multipart(copy=False)
        client, number = client_frame.bytes, -1
        try:
            number = _job_number(frames[0].buffer if frames else b"")
            buffers = [frame.buffer for frame in frames]
            header, _ = unpack(buffers, RequestHeader)
            if isinstance(header.body, Hello):
                self._see_ends()  # of a connection whose socket had the number that this one's has now
                self._clients.note(client, header.body, client_frame.get(zmq.SRCFD))
                self._board.note(clients=self._clients.names())
            job = QueuedJob(client, header.job, buffers, self._clients.name(client))
            if reply := self._take(job, header.body, router):
                self._answer(router, client, number, reply)
            elif keys := [meta.key for meta in header.tensors if meta.key is not None]:
                self._free(self._sent_keys.note(client, keys))
        except BackendError as error:
            self._refuse(router, client, number, error)
        except Exception as error:
            log.exception("a message could not be taken")
            words = f"A message can't be read: {type(error).__name__}: {error}."
            self._refuse(router, client, number, ProtocolError(words, "Speak as parallel_backend.rpc does."))

    def _take(self, job: QueuedJob, body: Request, router: zmq.Socket[bytes]) -> Reply | None:
        """The answer to a control message; a job waits for its turn."""
        if isinstance(body, Hello):
            return self._board.welcome
        if isinstance(body, Status):
            return self._board.snapshot(len(self.jobs))
        if isinstance(body, Ping):
            return self._pong(job.client, body.job)
        if isinstance(body, Cancel):
            if found := self._open.get((job.client, body.job)):
                found[0].cancelled.set()
            return Done()
        if isinstance(body, Goodbye):
            self._free(self._sent_keys.forget(job.client))
            self._clients.leave(job.client)
            self._board.note(clients=self._clients.names())
            return Done()
        if isinstance(body, Adjust):
            before = self._board.snapshot(len(self.jobs))
            wanted = body.on(before.idle_seconds, before.memory_budget)
            if (before.idle_seconds, before.memory_budget) != (wanted.idle_seconds, wanted.memory_budget):
                self._board.note(idle_seconds=wanted.idle_seconds, memory_budget=wanted.memory_budget)
                self.jobs.put(own_job(wanted))
            return before
        if isinstance(body, StopUnused) and (self._open or not self._clients.nobody_but(body.client, body.machine)):
            return self._board.snapshot(len(self.jobs))
        if isinstance(body, (Stop, StopUnused)):
            for waiting, _ in self._open.values():
                waiting.cancelled.set()
            self.jobs.end()
            return Done()
        if (job.client, job.number) in self._open:
            raise ProtocolError(f"Request {job.number} is under way already.", "Give each request a number of its own.")
        if len(self._open) >= MOST_OPEN:
            raise ProtocolError(f"{MOST_OPEN} requests wait already.", "Send the next when one is done.")
        self._open[job.client, job.number] = job, router
        self.jobs.put(job)
        return None

    def _see_ends(self) -> None:
        """Connections that were closed meanwhile, or whose process was killed."""
        for monitor in self._ends:
            while monitor.poll(0):
                self._clients.cut(recv_monitor_message(monitor)["value"])
                self._board.note(clients=self._clients.names())

    def _free(self, keys: Sequence[str]) -> None:
        if keys:
            self.jobs.put(own_job(Forget(list(keys))))

    def _pong(self, client: bytes, number: int) -> Pong:
        found = self._open.get((client, number))
        return Pong(known=found is not None, ahead=(self.jobs.ahead_of(found[0]) if found else None) or 0)

    def _refuse(self, router: zmq.Socket[bytes], client: bytes, number: int, error: BackendError) -> None:
        refused = self._board.count_refused()
        if refused & (refused - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: a flood must not fill the disk
            log.warning("refused message number %d: %s", refused, error.message[:300])
        self._answer(router, client, number, Failed(error.code, error.message[:2000], error.remedy))

    def _answer(self, router: zmq.Socket[bytes], client: bytes, number: int, body: Reply) -> None:
        self._send(router, client, pack(ReplyHeader(number, body), []))

    def _send(self, router: zmq.Socket[bytes], client: bytes, frames: Sequence[Frame | zmq.Frame]) -> None:
        """To a client that is there; the jobs of one that is gone, or takes nothing any more, are cancelled."""
        try:
            router.send_multipart([client, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:
            for (owner, _), (job, _) in self._open.items():
                if owner == client and not job.cancelled.is_set():
                    log.info("job %s: its client is gone", job.label)
                    job.cancelled.set()

    def _mend(self) -> None:
        """A socket whose file was removed is bound once more; to unbind it first would cut those who are connected."""
        for address, router in self._routers.items():
            if address.startswith("ipc://") and not Path(address.removeprefix("ipc://")).exists():
                log.warning("%s was removed; it is there again", address)
                with contextlib.suppress(OSError, zmq.ZMQError):
                    _bind(router, address)
        try:
            self._look_round()
        except (OSError, BackendError) as error:
            log.warning("looking round: %s", error)


class _Numbered(msgspec.Struct):
    job: int = -1


def _bind(router: zmq.Socket[bytes], address: str) -> None:
    """Listens; the file of an ipc address is for its user alone."""
    previous = os.umask(0o177)
    try:
        router.bind(address)
    finally:
        os.umask(previous)


def _job_number(frame: Frame) -> int:
    try:
        return msgspec.msgpack.decode(frame, type=_Numbered).job
    except (msgspec.DecodeError, msgspec.ValidationError):
        return -1
