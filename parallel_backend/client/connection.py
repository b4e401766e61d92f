"""One connection to a backend: requests that end in a result or a typed error, through restarts of its ranks."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial

import zmq
from torch import Tensor

from ..config import BackendSpec
from ..errors import (
    BackendError,
    BackendLostError,
    CancelledError,
    ConfigError,
    MissingTensorsError,
    OutOfMemoryError,
    ProtocolError,
    RankError,
    UnseenTensorsError,
    error_from_code,
)
from ..rpc import runtime_dir as files
from ..rpc.headers import ReplyHeader, RequestHeader
from ..rpc.messages import (
    FINAL_REPLIES,
    Adjust,
    BackendState,
    Cancel,
    Failed,
    Goodbye,
    Hello,
    LoadControl,
    Loaded,
    LoadModel,
    LoadVAE,
    Ping,
    Pong,
    Progress,
    Reply,
    Request,
    Status,
    StepDone,
    Stop,
    Unload,
    Welcome,
)
from ..rpc.wire import pack, unpack
from .asking import own_hello
from .places import RECONNECT_SECONDS, Place
from .sent_tensors import Attachment, SentTensors
from .shared_area import SharedArea

POLL_MS = 50
GOODBYE_MS = 500
LIVENESS_SECONDS = 0.5
PING_SECONDS = 2.0
# A backend that computes answers pings all the same; its other ranks end a stopped one sooner than this.
SILENT_SECONDS = 20.0
CONTROL_SECONDS = 10.0
CONTROL = (Hello, Status, Cancel, Stop, Adjust)
# Once whole, once by the socket, in whatever order the ranks find what they lack.
RESENDS = 2
# Who waits longer for a backend's ranks is told what they are at.
NOTED_SECONDS = 0.5
# A backend that has ended is not started for these.
NEVER_STARTING = (Status, Stop, Unload)
ENDING = (RankError.code, OutOfMemoryError.code, BackendLostError.code)

OnEvent = Callable[[Progress | StepDone, Sequence[Tensor]], None]


class Connection:
    """To the ranks of one name. One request at a time; use one per thread that must not wait.

    A lost backend is an error of the request under way; the next request finds the restarted ranks.
    """

    def __init__(self, spec: BackendSpec, place: Place, record: files.BackendRecord) -> None:
        """`place` is where `record` was found. Raises: BackendLostError, ProtocolError."""
        self.spec = spec
        self.record = record
        self._place = place
        self.lock = threading.RLock()
        self._socket: zmq.Socket[bytes] | None = None
        self._sent = SentTensors(None if spec.address else SharedArea())
        self._jobs = 0
        self._lost = False
        # Told of long work in any request: models that load again by themselves, patches, compilers.
        self.on_progress: Callable[[Progress], object] | None = None
        # Whether a request is under way; who holds the lock and finds so is one of its callbacks.
        self.asking = False
        try:
            self._connect(record)
        except BackendLostError:
            if not place.asks:
                raise
            self._lost = True  # it fell, or was ended for another process, as soon as it was found
            self.follow_restarts()
        self.adjust()

    @property
    def generation(self) -> str:
        """Changes whenever the ranks are restarted."""
        return self.record.generation

    @property
    def world_size(self) -> int:
        return self.record.world_size

    def close(self) -> None:
        """Leave the backend; it runs on, and forgets the prompts that this connection has sent."""
        with self.lock:
            if self._socket is not None:
                self._send(Goodbye())
                self._socket.close(linger=GOODBYE_MS)
                self._socket = None
                self._close_area()

    def adjust(self) -> None:
        """The backend has the idle time and memory budget that were asked for; where it had others, `taken_notes` says so.

        One that belongs to a `serve` keeps what its owner has given it.
        """
        wanted = self._place.settings
        if wanted == Adjust() or self.record.foreground or self.record.listen:
            return
        before, _ = self.request(wanted)
        assert isinstance(before, BackendState)
        changes = []
        if wanted.memory_budget not in (None, before.memory_budget):
            now, then = (
                f"{budget / 2**20:.0f} MiB a rank" if budget else "none"
                for budget in (wanted.memory_budget, before.memory_budget)
            )
            changes.append(f"memory budget {now} (was {then})")
        if wanted.idle_seconds is not None and wanted.idle_seconds != before.idle_seconds:
            changes.append(f"idle time {wanted.idle_seconds / 60:.3g} min (was {before.idle_seconds / 60:.3g})")
        if changes:
            self._place.notes.append(f"Backend {self.spec.name!r} has taken over: {', '.join(changes)}.")

    def taken_notes(self) -> str:
        """What its user should know of how the backend came to be as it is, told once; empty where there is nothing."""
        notes = "\n".join(self._place.notes)
        self._place.notes.clear()
        return notes

    def status(self, should_cancel: Callable[[], bool] | None = None) -> BackendState:
        reply, _ = self.request(Status(), should_cancel=should_cancel)
        assert isinstance(reply, BackendState)
        return reply

    def load(
        self,
        load: LoadModel | LoadVAE | LoadControl,
        on_event: OnEvent | None,
        should_cancel: Callable[[], bool] | None,
    ) -> Loaded:
        reply, _ = self.request(load, on_event=on_event, should_cancel=should_cancel)
        assert isinstance(reply, Loaded)
        return reply

    def request(
        self,
        body: Request,
        attachments: Sequence[Attachment] = (),
        *,
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
        room: int = 0,
    ) -> tuple[Reply, list[Tensor]]:
        """Send a request and wait for its final reply, whose tensors are the caller's own.

        Args:
            room: bytes that its tensors may take in memory, where the ranks are of this machine.
            on_event: told of progress and steps. What it raises cancels the job and is raised again.
            should_cancel: asked about twenty times a second.
        Raises: CancelledError, BackendLostError, ConfigError after `close`, or what the backend says.
        """
        with self.lock:
            if self._socket is None:
                raise ConfigError(f"This connection to backend {self.spec.name!r} was closed.", "Attach to it again.")
            self.follow_restarts(should_cancel, start=not isinstance(body, NEVER_STARTING))
            self.asking = True
            try:
                return self._delivered(partial(self._exchange, body, attachments, on_event, should_cancel, room))
            finally:
                self.asking = False

    def _delivered(self, exchange: Callable[[], tuple[Reply, list[Tensor]]]) -> tuple[Reply, list[Tensor]]:
        """What comes of it, done again where the ranks lack tensors that it names: each remedy holds for the tries after it."""
        for _ in range(RESENDS):
            try:
                return exchange()
            except MissingTensorsError:
                # Another client may push out, or free, the others too before this is there again: all travel with it now.
                self._sent.forget()
            except UnseenTensorsError:  # ranks of other machines have joined this one's
                self._close_area()
        return exchange()

    def _close_area(self) -> None:
        if self._sent.area is not None:
            self._sent.area.close()
            self._sent.area = None

    def _exchange(
        self,
        body: Request,
        attachments: Sequence[Attachment],
        on_event: OnEvent | None,
        should_cancel: Callable[[], bool] | None,
        room: int = 0,
    ) -> tuple[Reply, list[Tensor]]:
        self._jobs += 1
        job = self._jobs
        metas, sent, keys = self._sent.prepare(attachments)
        assert self._socket is not None
        header = RequestHeader(job, body, metas, self._sent.room(room) if room else None)
        self._socket.send_multipart(pack(header, sent), copy=False)
        line = _Line(self, job, pinged=not isinstance(body, CONTROL))
        try:
            reply, tensors, pending = self._await(line, job, on_event, should_cancel)
        except BaseException as error:
            if not isinstance(error, BackendError):  # a Ctrl-C here must not leave the job running there
                self._send(Cancel(job))
            if attachments:
                self._sent.give_up()
            raise
        return self._final(reply, tensors, keys, pending)

    def _await(
        self,
        line: _Line,
        job: int,
        on_event: OnEvent | None,
        should_cancel: Callable[[], bool] | None,
    ) -> tuple[Reply, list[Tensor], BaseException | None]:
        """The final reply of a request that was sent, and what a callback has raised meanwhile."""
        assert self._socket is not None
        pending: BaseException | None = None
        while True:
            if self._socket.poll(POLL_MS):
                frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
                header, tensors = unpack(frames, ReplyHeader)
                line.heard(header)
                if header.job != job:
                    continue  # of a ping or a cancel, or the end of a job that was given up
                if isinstance(header.body, FINAL_REPLIES):
                    there = zip(header.tensors, tensors, strict=True)
                    # A frame's memory is read-only.
                    own = [self._sent.read(meta) if tensor is None else tensor.clone() for meta, tensor in there]
                    return header.body, own, pending
                if pending is None:
                    assert isinstance(header.body, (Progress, StepDone))
                    try:
                        self._tell(header.body, [t for t in tensors if t is not None], on_event)
                    except BaseException as error:  # noqa: BLE001 - ComfyUI interrupts with a BaseException
                        pending = error
                        self._send(Cancel(job))
            if pending is None and should_cancel is not None and should_cancel():
                pending = CancelledError("The job was cancelled.")
                self._send(Cancel(job))
            try:
                line.check()
            except BackendLostError:
                if pending is not None:  # who has given the job up is told that, however it ended
                    raise pending from None
                raise

    def _tell(self, event: Progress | StepDone, tensors: Sequence[Tensor], on_event: OnEvent | None) -> None:
        if self.on_progress is not None and isinstance(event, Progress):
            self.on_progress(event)
        if on_event is not None:
            on_event(event, tensors)

    def _final(
        self, body: Reply, tensors: list[Tensor], keys: list[str], pending: BaseException | None
    ) -> tuple[Reply, list[Tensor]]:
        if isinstance(body, Failed) and body.code in ENDING:
            # Its ranks may be about to end: the next request must not go to what is still there of them.
            self._lost = True
        if pending is not None:
            raise pending
        if isinstance(body, Failed) and body.code == CancelledError.code:
            # Not by this client: what it was told didn't arrive, so the backend took it for gone.
            raise self.lost()
        if isinstance(body, Failed):
            raise error_from_code(body.code, body.message, body.remedy, body.details)
        self._sent.note_sent(keys)
        return body, tensors

    def _send(self, body: Cancel | Ping | Goodbye) -> int:
        """A control message whose answer nobody waits for; its number."""
        assert self._socket is not None
        self._jobs += 1
        self._socket.send_multipart(pack(RequestHeader(self._jobs, body), []))
        return self._jobs

    # -- following a backend through its restarts ---------------------------------------------------------------

    def _connect(self, record: files.BackendRecord) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
        # The process's own context: one of ours, collected before its socket, would wait for that socket forever.
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._place.connect(self._socket, record)
        self.record = record
        self._sent.forget()
        hello = own_hello()
        if self.spec.address:
            hello = Hello(f"{hello.client} on {socket.gethostname()}", hello.machine)
        reply, _ = self._exchange(hello, (), None, None)
        met = self._place.met(record, reply) if isinstance(reply, Welcome) else None
        if met is None:
            raise ProtocolError("Another backend answered than the runtime folder names.", "Run the prompt again.")
        self.record, self._lost = met, False

    def follow_restarts(self, should_cancel: Callable[[], bool] | None = None, *, start: bool = True) -> None:
        """Between requests: follow the backend to its next generation, or start it anew if it has ended.

        Where it is another than was asked for, it is restarted if nobody else works with it, unless `start` is False.

        Raises: CancelledError; StartError: it has ended, and is not to be started; BackendInUseError.
        """
        with self.lock:
            self._follow_restarts(should_cancel, start)

    def _follow_restarts(self, should_cancel: Callable[[], bool] | None, start: bool) -> None:
        deadline = time.monotonic() + RECONNECT_SECONDS

        def waiting(seconds: float, what: str) -> None:
            if should_cancel is not None and should_cancel():
                raise CancelledError("The job was cancelled.")
            if self.on_progress is not None and seconds > NOTED_SECONDS:
                self.on_progress(Progress(f"backend {self.spec.name!r}: {what}", 0, 1))

        while True:
            record = self._place.current() or (self.record if self.spec.address else None)
            if (
                record is not None
                and record.generation == self.record.generation
                and not self._lost
                and (not start or self._place.fits(record))
            ):
                return
            try:
                self._connect(self._place.next(self.record, waiting, start))
                return
            except BackendLostError:  # it fell again, or its rank 0 is stopped and about to be ended
                if self.spec.address or time.monotonic() > deadline:
                    raise

    def check_there(self, since: float) -> None:
        """Raises: BackendLostError: the ranks that this request went to are no more."""
        try:
            self._place.check(self.record, since)
        except BackendLostError:
            self._lost = True
            raise

    def lost(self, seconds: float | None = None) -> BackendLostError:
        """What to raise where nothing was heard for so long, or the request is not known there."""
        self._lost = True
        return self._place.lost(self.record, seconds)


class _Line:
    """Whether the backend is still there while a request waits.

    Args:
        pinged: control messages are answered at once, or never.
    """

    def __init__(self, connection: Connection, job: int, *, pinged: bool) -> None:
        self._connection, self._job, self._pinged = connection, job, pinged
        self._begun, now = time.time(), time.monotonic()
        self._last = self._checked = now
        self._next_look, self._next_ping = now + LIVENESS_SECONDS, now + PING_SECONDS
        self._pings: set[int] = set()

    def heard(self, header: ReplyHeader) -> None:
        """Raises: BackendLostError: the backend says that it doesn't know the request."""
        self._last = time.monotonic()
        if header.job in self._pings and isinstance(header.body, Pong):
            self._pings.discard(header.job)
            if not header.body.known:
                raise self._connection.lost()

    def check(self) -> None:
        """Raises: BackendLostError: its ranks are gone, or it is silent."""
        now = time.monotonic()
        if now - self._checked > LIVENESS_SECONDS:  # a callback took long, or this process stood still: nobody listened
            self._last = now
        self._checked = now
        if now > self._next_look:
            self._next_look = now + LIVENESS_SECONDS
            self._connection.check_there(self._begun)
        if now - self._last > (SILENT_SECONDS if self._pinged else CONTROL_SECONDS):
            raise self._connection.lost(now - self._last)
        if self._pinged and now > self._next_ping:
            self._next_ping = now + PING_SECONDS
            self._pings.add(self._connection._send(Ping(self._job)))
