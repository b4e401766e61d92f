"""The Python face: a backend, the models in it, and requests that end in a result or a typed error."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from torch import Tensor

from ..config import DEFAULT_IDLE_SECONDS, BackendSpec, MeshSpec
from ..errors import (
    BackendLostError,
    CancelledError,
    MissingTensorsError,
    ProtocolError,
    StartError,
    error_from_code,
)
from ..safetensors_file import content_key
from . import launcher
from . import runtime_dir as files
from .messages import (
    FINAL_REPLIES,
    BackendState,
    Cancel,
    Failed,
    Hello,
    Loaded,
    LoadModel,
    LoadVAE,
    ModelKind,
    Progress,
    Reply,
    ReplyHeader,
    Request,
    RequestHeader,
    Status,
    StepDone,
    Stop,
    Unload,
    Welcome,
)
from .remote import RemoteModel, RemoteVAE
from .sent_tensors import Attachment, SentTensors
from .wire import pack, unpack

POLL_MS = 50
LIVENESS_SECONDS = 0.5
RECONNECT_SECONDS = 60.0

OnEvent = Callable[[Progress | StepDone, Sequence[Tensor]], None]


class Backend:
    """A connection to the ranks of one name. One request at a time; use one Backend per thread that must not wait.

    A lost backend is an error of the request under way; the next request finds the restarted ranks and loads its
    model again.
    """

    def __init__(self, spec: BackendSpec, record: files.BackendRecord) -> None:
        """Use `attach_or_start` or `attach`."""
        self.spec = spec
        self.record = record
        self.lock = threading.RLock()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._sent = SentTensors()
        self._jobs = 0
        self._falls_seen = 0
        self._connect(record)

    @classmethod
    def attach_or_start(
        cls,
        world_size: int | None = None,
        device: str | None = None,
        name: str = "default",
        *,
        devices: Sequence[int] = (),
        idle_seconds: float = DEFAULT_IDLE_SECONDS,
        memory_budget: int = 0,
        waiting: launcher.Waiting = lambda seconds: None,
    ) -> Backend:
        """A backend that is ready. Without `world_size` and `device`: all GPUs, or two CPU ranks where there is none.

        Raises:
            ConfigError: one of that name runs with other ranks.
            StartError: it did not come up; the message has the end of its log.
        """
        if world_size is None or device is None:
            found_device, found_size = launcher.default_ranks()
            device = device or found_device
            world_size = world_size or (len(devices) or found_size if device == found_device else 2)
        spec = BackendSpec(name, world_size, device, tuple(devices), idle_seconds, memory_budget)  # type: ignore[arg-type]
        return cls(spec, launcher.attach_or_start(spec, waiting))

    @classmethod
    def attach(cls, name: str = "default") -> Backend:
        """The running backend of that name, whatever its ranks are.

        Raises: StartError: none runs.
        """
        record = files.read_record(name)
        if record is None:
            raise StartError(f"No backend {name!r} runs.", "Start one with `python -m parallel_backend serve`.")
        spec = BackendSpec(name, record.world_size, record.device, tuple(record.devices))  # type: ignore[arg-type]
        return cls(spec, record)

    @property
    def generation(self) -> str:
        """Changes whenever the ranks are restarted."""
        return self.record.generation

    @property
    def world_size(self) -> int:
        return self.spec.world_size

    # -- requests ---------------------------------------------------------------------------------------------

    def load_model(
        self,
        path: str | os.PathLike[str],
        mesh: MeshSpec | None = None,
        dtype: str = "bfloat16",
        kernel: str = "auto",
        *,
        kind: ModelKind = "any",
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteModel:
        """An SD3, SD3.5 or SDXL model, resident and sharded. A file that is resident already is not read again.

        Args:
            mesh: None takes cfg 2 where the ranks are even; the rest is ulysses, or bands (patch) for a UNet.
            kind: refuses a file of another one.
        Raises: CheckpointError, ConfigError.
        """
        resolved = Path(path).resolve()
        load = LoadModel(str(resolved), content_key(resolved), dtype, mesh, kernel, kind)
        return RemoteModel(self, load, self.load(load, on_event, should_cancel))

    def load_vae(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        dtype: str = "bfloat16",
        *,
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteVAE:
        """A VAE, whole on every rank. `path` is one file, or TAESD's (encoder, decoder).

        Raises: CheckpointError, ConfigError.
        """
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        resolved = [Path(p).resolve() for p in paths]
        key = "-".join(content_key(p) for p in resolved)
        load = LoadVAE([str(p) for p in resolved], key, dtype)
        return RemoteVAE(self, load, self.load(load, on_event, should_cancel))

    def status(self) -> BackendState:
        reply, _ = self.request(Status())
        assert isinstance(reply, BackendState)
        return reply

    def unload(self, models: Sequence[str] = ()) -> None:
        """Free these models of the backend; all where none is named."""
        self.request(Unload(list(models)))

    def stop(self, seconds: float = 20.0) -> None:
        """Ends the backend's processes and waits until they are gone.

        Raises: StartError: they still run after `seconds`.
        """
        with contextlib.suppress(BackendLostError):
            self.request(Stop())
        if not files.wait_until_gone(self.record.agent_pid, seconds):
            raise StartError(
                f"Backend {self.spec.name!r} (process {self.record.agent_pid}) still runs {seconds:.0f} s after stop.",
                f"End it with `kill {self.record.agent_pid}`.",
            )
        self.close()

    def close(self) -> None:
        """Leave the backend; it runs on."""
        with self.lock:
            if self._socket is not None:
                self._socket.close(linger=0)
                self._socket = None
            self._context.destroy(linger=0)

    def load(
        self, load: LoadModel | LoadVAE, on_event: OnEvent | None, should_cancel: Callable[[], bool] | None
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
    ) -> tuple[Reply, list[Tensor]]:
        """Send a request and wait for its final reply.

        Args:
            on_event: told of progress and steps. What it raises cancels the job and is raised again.
            should_cancel: asked about twenty times a second.
        Raises: CancelledError, BackendLostError, or what the backend says.
        """
        with self.lock:
            self.follow_restarts()
            try:
                return self._exchange(body, attachments, on_event, should_cancel)
            except MissingTensorsError as missing:
                self._sent.forget(missing.keys)
                return self._exchange(body, attachments, on_event, should_cancel)

    def _exchange(
        self,
        body: Request,
        attachments: Sequence[Attachment],
        on_event: OnEvent | None,
        should_cancel: Callable[[], bool] | None,
    ) -> tuple[Reply, list[Tensor]]:
        self._jobs += 1
        job = self._jobs
        metas, sent, keys = self._sent.prepare(attachments)
        assert self._socket is not None
        self._socket.send_multipart(pack(RequestHeader(job, body, metas), sent), copy=False)
        begun = time.time()
        pending: BaseException | None = None
        next_check = time.monotonic() + LIVENESS_SECONDS
        while True:
            if self._socket.poll(POLL_MS):
                frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
                header, tensors = unpack(frames, ReplyHeader)
                if header.job != job:
                    continue  # the acknowledgement of a cancel, or the end of a job that was given up
                full = [t for t in tensors if t is not None]
                if isinstance(header.body, FINAL_REPLIES):
                    return self._final(header.body, full, keys, pending)
                if on_event is not None and pending is None:
                    assert isinstance(header.body, (Progress, StepDone))
                    try:
                        on_event(header.body, full)
                    except BaseException as error:  # noqa: BLE001 - ComfyUI interrupts with a BaseException
                        pending = error
                        self._send_cancel(job)
            if pending is None and should_cancel is not None and should_cancel():
                pending = CancelledError("The job was cancelled.")
                self._send_cancel(job)
            if time.monotonic() > next_check:
                next_check = time.monotonic() + LIVENESS_SECONDS
                self._check_alive(begun)

    def _final(
        self, body: Reply, tensors: list[Tensor], keys: list[str], pending: BaseException | None
    ) -> tuple[Reply, list[Tensor]]:
        if pending is not None:
            raise pending
        if isinstance(body, Failed):
            raise error_from_code(body.code, body.message, body.remedy)
        self._sent.note_sent(keys)
        return body, tensors

    def _send_cancel(self, job: int) -> None:
        assert self._socket is not None
        self._jobs += 1
        self._socket.send_multipart(pack(RequestHeader(self._jobs, Cancel(job)), []))

    # -- the connection ---------------------------------------------------------------------------------------

    def _connect(self, record: files.BackendRecord) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(record.address)
        self.record = record
        self._sent.forget()
        self._falls_seen = len(files.fallen_ranks(self.spec.name))
        reply, _ = self._exchange(Hello(f"pid {os.getpid()}"), (), None, None)
        if not isinstance(reply, Welcome) or reply.generation != record.generation:
            raise ProtocolError("Another backend answered than the runtime folder names.", "Run the prompt again.")

    def follow_restarts(self) -> None:
        """Between requests: follow the backend to its next generation, or start it anew if it has ended."""
        record = files.read_record(self.spec.name)
        if record is not None and record.generation == self.record.generation:
            return
        if record is None and files.is_alive(self.record.agent_pid):
            record = self._restarted_by_torchrun()
        if record is None:
            record = launcher.attach_or_start(self.spec)
        self._connect(record)

    def _restarted_by_torchrun(self) -> files.BackendRecord | None:
        deadline = time.monotonic() + RECONNECT_SECONDS
        while time.monotonic() < deadline and files.is_alive(self.record.agent_pid):
            if record := files.read_record(self.spec.name):
                return record
            time.sleep(0.1)
        return None

    def _check_alive(self, since: float) -> None:
        record = files.read_record(self.spec.name)
        if record is None or record.generation != self.record.generation:
            raise BackendLostError(
                f"The backend {self.spec.name!r} was lost in the middle of a request: {self._what_happened(since)}.",
                f"Run the prompt again: its ranks are being restarted. The log is "
                f"{files.runtime_dir(self.spec.name) / 'backend.log'}.",
            )

    def _what_happened(self, since: float) -> str:
        """The word of torchrun on the rank that fell, which comes a moment later, and the ranks' own last words."""
        deadline = time.monotonic() + 3.0
        while len(files.fallen_ranks(self.spec.name)) <= self._falls_seen and time.monotonic() < deadline:
            time.sleep(0.1)
        falls = files.fallen_ranks(self.spec.name)[self._falls_seen :]
        words = [*falls[:1], files.last_words(self.spec.name, since)]
        return "; ".join(filter(None, words)) or "no rank left a message"
