"""The Python face: a backend, the models in it, and requests that end in a result or a typed error."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zmq
from torch import Tensor

from ..config import DEFAULT_IDLE_SECONDS, BackendSpec, MeshSpec, SamplerSpec
from ..errors import (
    BackendLostError,
    CancelledError,
    MissingTensorsError,
    ProtocolError,
    StartError,
    UnknownModelError,
    error_from_code,
)
from ..safetensors_file import content_key
from . import launcher
from . import runtime_dir as files
from .messages import (
    FINAL_REPLIES,
    BackendState,
    Cancel,
    Decode,
    Encode,
    Failed,
    Forward,
    Hello,
    Loaded,
    LoadModel,
    LoadVAE,
    Progress,
    Prompt,
    Reply,
    ReplyHeader,
    Request,
    RequestHeader,
    Result,
    Sample,
    Status,
    StepDone,
    Stop,
    TensorMeta,
    Unload,
    Welcome,
)
from .wire import pack, tensor_hash, tensor_meta, unpack

POLL_MS = 50
LIVENESS_SECONDS = 0.5
RECONNECT_SECONDS = 60.0
_REMEMBERED = 16

OnEvent = Callable[[Progress | StepDone, Sequence[Tensor]], None]


@dataclass(frozen=True)
class Conditioning:
    """A prompt as SD3 takes it.

    Args:
        context: (B, L, E) text tokens.
        pooled: (B, A).
    """

    context: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Step:
    """What `on_step` is told: step `index` of `total` is done. x and denoised, where a preview was asked for."""

    index: int
    total: int
    x: Tensor | None = None
    denoised: Tensor | None = None


@dataclass(frozen=True)
class _Attachment:
    """A tensor of a request; `kept` ones are sent once and then named by their hash."""

    tensor: Tensor
    kept: bool = False


class SentTensors:
    """Which tensors the backend has, so that an unchanged prompt is compared, not sent and not hashed again."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._sent: set[str] = set()

    def hash_of(self, tensor: Tensor) -> str:
        for known_hash, known in reversed(self._known.items()):
            if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor.cpu()):
                self._known.move_to_end(known_hash)
                return known_hash
        new_hash = tensor_hash(tensor)
        # A copy: the caller may write into its own tensor, and must not be taken for unchanged then.
        self._known[new_hash] = tensor.detach().cpu().clone()
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return new_hash

    def was_sent(self, tensor_hash: str) -> bool:
        return tensor_hash in self._sent

    def note_sent(self, hashes: Sequence[str]) -> None:
        self._sent.update(hashes)

    def forget(self, hashes: Sequence[str] | None = None) -> None:
        self._sent.difference_update(self._sent.copy() if hashes is None else hashes)


class Backend:
    """A connection to the ranks of one name. One request at a time; use one Backend per thread that must not wait.

    A lost backend is an error of the request under way; the next request finds the restarted ranks and loads its
    model again.
    """

    def __init__(self, spec: BackendSpec, record: files.BackendRecord) -> None:
        """Use `attach_or_start` or `attach`."""
        self.spec = spec
        self.record = record
        self._lock = threading.RLock()
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
            raise StartError(f"No backend {name!r} runs.", "Start one with `parallel-mmdit serve`.")
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
        on_event: OnEvent | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> RemoteModel:
        """An SD3 or SD3.5 model, resident and sharded. A file that is resident already is not read again.

        Args:
            mesh: None takes cfg 2 where the ranks are even, the rest ulysses.
        Raises: CheckpointError, ConfigError.
        """
        resolved = Path(path).resolve()
        load = LoadModel(
            str(resolved), content_key(resolved), dtype, mesh or MeshSpec.exact_default(self.world_size), kernel
        )
        return RemoteModel(self, load, self._load(load, on_event, should_cancel))

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
        return RemoteVAE(self, load, self._load(load, on_event, should_cancel))

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
        with self._lock:
            if self._socket is not None:
                self._socket.close(linger=0)
                self._socket = None
            self._context.destroy(linger=0)

    def _load(
        self, load: LoadModel | LoadVAE, on_event: OnEvent | None, should_cancel: Callable[[], bool] | None
    ) -> Loaded:
        reply, _ = self.request(load, on_event=on_event, should_cancel=should_cancel)
        assert isinstance(reply, Loaded)
        return reply

    def request(
        self,
        body: Request,
        attachments: Sequence[_Attachment] = (),
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
        with self._lock:
            self._reconnect_if_restarted()
            try:
                return self._exchange(body, attachments, on_event, should_cancel)
            except MissingTensorsError as missing:
                self._sent.forget(missing.hashes)
                return self._exchange(body, attachments, on_event, should_cancel)

    def _exchange(
        self,
        body: Request,
        attachments: Sequence[_Attachment],
        on_event: OnEvent | None,
        should_cancel: Callable[[], bool] | None,
    ) -> tuple[Reply, list[Tensor]]:
        self._jobs += 1
        job = self._jobs
        metas, sent, hashes = self._prepare(attachments)
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
                    return self._final(header.body, full, hashes, pending)
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
        self, body: Reply, tensors: list[Tensor], hashes: list[str], pending: BaseException | None
    ) -> tuple[Reply, list[Tensor]]:
        if pending is not None:
            raise pending
        if isinstance(body, Failed):
            raise error_from_code(body.code, body.message, body.remedy)
        self._sent.note_sent(hashes)
        return body, tensors

    def _prepare(self, attachments: Sequence[_Attachment]) -> tuple[list[TensorMeta], list[Tensor], list[str]]:
        metas, sent, hashes = [], [], []
        for attachment in attachments:
            tensor, kept_hash = attachment.tensor, None
            if attachment.kept:
                kept_hash = self._sent.hash_of(tensor)
            known = kept_hash is not None and (self._sent.was_sent(kept_hash) or kept_hash in hashes)
            metas.append(tensor_meta(tensor, sent=not known, hash=kept_hash))
            if not known:
                sent.append(tensor)
                if kept_hash is not None:
                    hashes.append(kept_hash)
        return metas, sent, hashes

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

    def _reconnect_if_restarted(self) -> None:
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


@dataclass
class _Remote:
    """Something loaded in a backend; it is loaded again by itself when the backend has lost it."""

    backend: Backend
    load: LoadModel | LoadVAE
    loaded: Loaded
    _generation: str = field(init=False)

    def __post_init__(self) -> None:
        self._generation = self.backend.generation

    @property
    def name(self) -> str:
        """The name under which the backend holds it."""
        return self.loaded.model

    def ensure_loaded(self) -> Loaded:
        """Resident now; reads nothing where it was."""
        self.loaded = self.backend._load(self.load, None, None)
        self._generation = self.backend.generation
        return self.loaded

    def _request(
        self, body: Request, attachments: Sequence[_Attachment], **callbacks: Any
    ) -> tuple[Reply, list[Tensor]]:
        with self.backend._lock:
            self.backend._reconnect_if_restarted()
            if self._generation != self.backend.generation:
                self.ensure_loaded()
            try:
                return self.backend.request(body, attachments, **callbacks)
            except UnknownModelError:
                self.ensure_loaded()
                return self.backend.request(body, attachments, **callbacks)


class RemoteModel(_Remote):
    """A diffusion model in a backend."""

    @property
    def family(self) -> str:
        return self.loaded.family

    def sample(
        self,
        latent: Tensor,
        positive: Conditioning,
        negative: Conditioning | None = None,
        *,
        seed: int = 0,
        steps: int = 20,
        cfg_scale: float = 4.5,
        sampler: str = "euler",
        scheduler: str = "simple",
        denoise: float = 1.0,
        shift: float = 3.0,
        noise: Tensor | None = None,
        sigmas: Tensor | None = None,
        noise_mask: Tensor | None = None,
        batch_index: Sequence[int] | None = None,
        preview: bool = False,
        on_step: Callable[[Step], None] | None = None,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Tensor:
        """The sampled latent: KSampler's, for the same seed and settings.

        Args:
            latent: (B, 16, Y, X), unscaled as a VAE gives it; all zeros to start from noise alone.
            negative: None, or cfg_scale 1, computes no uncond branch.
            noise, sigmas: in place of those that seed and scheduler give.
            noise_mask: 1 where the latent may change, (B, 1, Y, X) of any Y and X.
            on_step: told after each step. What it raises cancels the job and is raised again.
        Returns: (B, 16, Y, X), fp32, on the CPU.
        Raises: InputError, ConfigError, CancelledError, BackendLostError, RankError.
        """
        spec = SamplerSpec(sampler, scheduler, steps, cfg_scale, denoise, seed, shift)
        attachments = [_Attachment(latent.float())]

        def attach(tensor: Tensor, kept: bool = False) -> int:
            attachments.append(_Attachment(tensor, kept))
            return len(attachments) - 1

        def prompt(conditioning: Conditioning) -> Prompt:
            return Prompt(attach(conditioning.context, kept=True), attach(conditioning.pooled, kept=True))

        body = Sample(
            self.name,
            spec,
            0,
            prompt(positive),
            None if negative is None else prompt(negative),
            mask=None if noise_mask is None else attach(noise_mask.float()),
            noise=None if noise is None else attach(noise.float()),
            sigmas=None if sigmas is None else attach(sigmas.float()),
            batch_index=None if batch_index is None else list(batch_index),
            preview=preview,
        )

        def on_event(event: Progress | StepDone, tensors: Sequence[Tensor]) -> None:
            if on_step is not None and isinstance(event, StepDone):
                x, denoised = tensors if tensors else (None, None)
                on_step(Step(event.index, event.total, x, denoised))

        reply, tensors = self._request(body, attachments, on_event=on_event, should_cancel=should_cancel)
        assert isinstance(reply, Result)
        return tensors[0].clone()

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor,
        *,
        should_cancel: Callable[[], bool] | None = None,
    ) -> Tensor:
        """One evaluation: the velocity, fp32, of latents in the model's scale; rows spread over cfg and dp.

        Args:
            x: (B, 16, Y, X). timesteps: (B,), 1000 * sigma. context: (B, L, E). pooled: (B, A).
        """
        attachments = [
            _Attachment(x),
            _Attachment(timesteps.float()),
            _Attachment(context, True),
            _Attachment(pooled, True),
        ]
        _, tensors = self._request(Forward(self.name, 0, 1, 2, 3), attachments, should_cancel=should_cancel)
        return tensors[0].clone()


class RemoteVAE(_Remote):
    """A VAE in a backend."""

    @property
    def latent_channels(self) -> int:
        return self.loaded.channels

    def decode(self, latent: Tensor, *, raw: bool = False, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, Y, X, 3) in 0..1, fp32; with `raw` the model's own (B, 3, Y, X), about -1..1.

        Args:
            latent: (B, C, Y, X), unscaled.
        """
        _, tensors = self._request(
            Decode(self.name, 0, raw), [_Attachment(latent.float())], should_cancel=should_cancel
        )
        return tensors[0].clone()

    def encode(self, image: Tensor, *, should_cancel: Callable[[], bool] | None = None) -> Tensor:
        """(B, C, Y / 8, X / 8), unscaled, fp32, of an image (B, Y, X, 3) in 0..1."""
        _, tensors = self._request(Encode(self.name, 0), [_Attachment(image.float())], should_cancel=should_cancel)
        return tensors[0].clone()
