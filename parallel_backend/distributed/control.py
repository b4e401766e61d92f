"""What ranks tell each other about jobs, beside the tensors: on the CPU, without pickle.

Collectives here may wait for days, until a job comes; a rank that dies ends them at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BackendError, RankError, beyond_a_line, error_from_code, in_a_line
from .device_faults import breaks_rank, known_fault
from .device_memory import as_out_of_memory

log = logging.getLogger("parallel_backend")

T = TypeVar("T")
Note = TypeVar("Note", bound=msgspec.Struct)

# A message's header, and as many tensors as one may have: see rpc/wire.py.
_MAX_FRAMES = 1 + 100
_SIZES_BYTES = 8 * (_MAX_FRAMES + 1)
_ENVELOPE_BYTES = 32 * 1024
_ALIGNED = 16
_NOTE_BYTES = 4096
# Of an error's message, and of its remedy: both, its code and what msgpack adds fit a note. Details have what they leave.
_TEXT_BYTES = 1900
_CUT = " ..."
_FOREVER = timedelta(days=3650)
# So long a rank that failed waits for the others to fail as well, before it takes them for stuck.
_VERDICT_SECONDS = 4.0


class _Outcome(msgspec.Struct):
    code: str = ""
    message: str = ""
    remedy: str = ""
    details: str = ""

    @classmethod
    def of(cls, error: BackendError) -> _Outcome:
        """The error, cut so that it fits a note in any alphabet: a rank that can't say its own leaves the others waiting."""
        message, remedy = _cut(error.message, _TEXT_BYTES), _cut(error.remedy, _TEXT_BYTES)
        left = 2 * _TEXT_BYTES - len(message.encode()) - len(remedy.encode())
        return cls(error.code, message, remedy, _cut(error.details, left) if left > len(_CUT) else "")

    def as_error(self) -> BackendError:
        return error_from_code(self.code, self.message, self.remedy, self.details)


class _Raised(msgspec.Struct):
    """Where a rank stood when it failed, and why."""

    place: list[int]
    error: _Outcome


class _Rows(msgspec.Struct):
    rows: int


class Control:
    """This rank's line to the others; alone in its world it talks to itself.

    Args:
        store: what ranks can leave notes in while a collective is stuck.
    """

    def __init__(self, store: dist.Store | None = None, device: torch.device | None = None) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=_FOREVER)
        self._store = store
        self.device = device or torch.device("cpu")
        self._jobs = self.calls = 0

    def hand_on(self, frames: Sequence[memoryview] | None) -> list[memoryview]:
        """The frames that rank 0 has, on every rank. Rank 0 gives them, the others give None and wait.

        Comm: one broadcast of sizes and of the frames that fit beside them, and one of each larger frame.
        """
        self._jobs += 1
        if self._group is None:
            assert frames is not None
            return list(frames)
        envelope = torch.zeros(_ENVELOPE_BYTES, dtype=torch.uint8)
        sizes = envelope[:_SIZES_BYTES].view(torch.int64)
        if frames is not None:
            sizes[: len(frames) + 1] = torch.tensor([len(frames), *map(len, frames)])
            for frame, start in zip(frames, _places(sizes), strict=True):
                if start is not None and len(frame):
                    envelope[start : start + len(frame)] = torch.frombuffer(frame, dtype=torch.uint8)
        dist.broadcast(envelope, 0, group=self._group)
        received = []
        for i, start in enumerate(_places(sizes)):
            size = int(sizes[i + 1])
            if start is not None:
                buffer = envelope[start : start + size]
            else:
                buffer = (
                    torch.frombuffer(frames[i], dtype=torch.uint8)
                    if frames is not None
                    else torch.empty(size, dtype=torch.uint8)
                )
                dist.broadcast(buffer, 0, group=self._group)
            received.append(buffer.numpy().data)
        return received

    def any(self, flag: bool) -> bool:
        """Whether rank 0 says so: its flag, on every rank."""
        if self._group is None:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8)
        self.calls += 1
        dist.broadcast(shared, 0, group=self._group)
        return bool(shared)

    def heard(self, flag: bool) -> bool:
        """Whether rank 0 has said so in this job, as far as this rank can know by now; no rank waits for another."""
        if self._group is None or self._store is None:
            return flag
        key = f"given up/{self._jobs}"
        if self.rank == 0 and flag:
            self._store.set(key, "1")
        return flag if self.rank == 0 else self._store.check([key])

    def gather(self, note: Note) -> list[Note]:
        """Every rank's note, in rank order. Notes are small: at most 4 KiB of msgpack."""
        if self._group is None:
            return [note]
        raw = msgspec.msgpack.encode(note)
        sent = torch.zeros(_NOTE_BYTES, dtype=torch.uint8)
        sent[:4] = torch.frombuffer(bytearray(len(raw).to_bytes(4, "little")), dtype=torch.uint8)
        sent[4 : 4 + len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self.calls += 1
        full = torch.empty(self.world_size * _NOTE_BYTES, dtype=torch.uint8)
        dist.all_gather(list(full.view(self.world_size, _NOTE_BYTES)), sent, group=self._group)
        notes = []
        for row in full.view(self.world_size, _NOTE_BYTES):
            data = row.numpy().tobytes()
            notes.append(msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4], "little")], type=type(note)))
        return notes

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Every rank's rows (n, C) of float64, in rank order; n may differ."""
        if self._group is None:
            return [rows]
        counts = [note.rows for note in self.gather(_Rows(len(rows)))]
        padded = torch.zeros(max(counts), rows.shape[1], dtype=rows.dtype)
        padded[: len(rows)] = rows
        full = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(full, padded, group=self._group)
        return [part[:count] for part, count in zip(full, counts, strict=True)]

    def agreed(self, local: Callable[[], T]) -> T:
        """What `local` returns, once it has succeeded on every rank; it must not communicate.

        Raises: the first rank's error, as the same error on every rank, so that all leave the job together; on one rank
        alone what it can't go on from.
        """
        result: T | None = None
        outcome = _Outcome()
        try:
            result = local()
        except Exception as error:
            if breaks_rank(error):  # it ends, and with it the others
                raise
            outcome = _Outcome.of(_survived(self.named(error)))
        if not self._any_rank(bool(outcome.code)):
            return result  # type: ignore[return-value]
        raise next(note for note in self.gather(outcome) if note.code).as_error()

    def named(self, error: Exception) -> BackendError:
        """Any error as one of ours, with this rank's name and what helps, where that is known."""
        if isinstance(error, BackendError):
            return error
        log.error("failed", exc_info=error)
        fault = known_fault(error)
        return as_out_of_memory(error, self.device, self.rank) or RankError(
            f"Rank {self.rank} failed: {in_a_line(error)}",
            fault.remedy if fault is not None else "",
            beyond_a_line(error),
        )

    def _any_rank(self, flag: bool) -> bool:
        if self._group is None:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8)
        self.calls += 1
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return bool(shared)

    def share(self, x: Tensor) -> Tensor:
        """Rank 0's `x` in place on every rank, over the default group of its device."""
        if self._group is not None:
            self.calls += 1
            dist.broadcast(x, 0)
        return x

    def verdict(self, error: Exception, place: Sequence[int]) -> BackendError | None:
        """The first rank's error, where every rank has failed in this job and at the same place; else None.

        Then no rank waits for another, and devices and communicators are as good as before.

        Args:
            place: how many collectives this rank has started, by axis.
        """
        if breaks_rank(error):
            return None
        named = _survived(self.named(error))
        if self._group is None:
            return named
        if self._store is None:
            return None
        mine = _Raised([self.calls, *place], _Outcome.of(named))
        self._store.set(f"raised/{self._jobs}/{self.rank}", msgspec.json.encode(mine).decode())
        keys = [f"raised/{self._jobs}/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + _VERDICT_SECONDS
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        raised = [msgspec.json.decode(note, type=_Raised) for note in self._store.multi_get(keys)]
        if any(note.place != mine.place for note in raised):
            return None
        return raised[0].error.as_error()


def _survived(error: BackendError) -> BackendError:
    """The error of a job after which ranks go on."""
    if isinstance(error, RankError) and not error.remedy:
        error.remedy = "The backend and its models go on; its log has the whole trace."
    return error


def _cut(text: str, most: int) -> str:
    """What of it fits that many bytes, up to a whole character. File names may hold bytes that are no characters, which can't be sent."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= most:
        return encoded.decode()
    return encoded[: most - len(_CUT)].decode(errors="ignore") + _CUT


def _places(sizes: Tensor) -> list[int | None]:
    """Where in the envelope each frame lies; None for one that travels by itself."""
    places: list[int | None] = []
    free = -(-_SIZES_BYTES // _ALIGNED) * _ALIGNED
    for size in sizes[1 : 1 + int(sizes[0])].tolist():
        fits = free + size <= _ENVELOPE_BYTES
        places.append(free if fits else None)
        free += -(-size // _ALIGNED) * _ALIGNED if fits else 0
    return places
