"""What ranks tell each other about jobs, beside the tensors: on the CPU, without pickle.

Collectives here may wait for days, until a job comes; a rank that dies ends them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BackendError, RankError, error_from_code

T = TypeVar("T")
Note = TypeVar("Note", bound=msgspec.Struct)

_MAX_FRAMES = 32
_SIZES_BYTES = 8 * (_MAX_FRAMES + 1)
_ENVELOPE_BYTES = 32 * 1024
_ALIGNED = 16
_NOTE_BYTES = 4096
_FOREVER = timedelta(days=3650)


class _Outcome(msgspec.Struct):
    code: str = ""
    message: str = ""
    remedy: str = ""


class _Rows(msgspec.Struct):
    rows: int


class Control:
    """This rank's line to the others; alone in its world it talks to itself."""

    def __init__(self) -> None:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=_FOREVER)

    def hand_on(self, frames: Sequence[memoryview] | None) -> list[memoryview]:
        """The frames that rank 0 has, on every rank. Rank 0 gives them, the others give None and wait.

        Comm: one broadcast of sizes and of the frames that fit beside them, and one of each larger frame.
        """
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
        dist.broadcast(shared, 0, group=self._group)
        return bool(shared)

    def gather(self, note: Note) -> list[Note]:
        """Every rank's note, in rank order. Notes are small: at most 4 KiB of msgpack."""
        if self._group is None:
            return [note]
        raw = msgspec.msgpack.encode(note)
        sent = torch.zeros(_NOTE_BYTES, dtype=torch.uint8)
        sent[:4] = torch.frombuffer(bytearray(len(raw).to_bytes(4, "little")), dtype=torch.uint8)
        sent[4 : 4 + len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
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

        Raises: the first rank's error, as the same error on every rank, so that all leave the job together.
        """
        result: T | None = None
        outcome = _Outcome()
        try:
            result = local()
        except BackendError as error:
            outcome = _Outcome(error.code, error.message, error.remedy)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            words = f"Rank {self.rank} failed: {type(error).__name__}: {error}"
            outcome = _Outcome(RankError.code, words, "The backend goes on; its log has the whole trace.")
        if not self._any_rank(bool(outcome.code)):
            return result  # type: ignore[return-value]
        short = _Outcome(outcome.code, outcome.message[:1500], outcome.remedy[:1500])
        said = next(note for note in self.gather(short) if note.code)
        raise error_from_code(said.code, said.message, said.remedy)

    def _any_rank(self, flag: bool) -> bool:
        if self._group is None:
            return flag
        shared = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return bool(shared)

    def share(self, x: Tensor) -> Tensor:
        """Rank 0's `x` in place on every rank, over the default group of its device."""
        if self._group is not None:
            dist.broadcast(x, 0)
        return x


def _places(sizes: Tensor) -> list[int | None]:
    """Where in the envelope each frame lies; None for one that travels by itself."""
    places: list[int | None] = []
    free = -(-_SIZES_BYTES // _ALIGNED) * _ALIGNED
    for size in sizes[1 : 1 + int(sizes[0])].tolist():
        fits = free + size <= _ENVELOPE_BYTES
        places.append(free if fits else None)
        free += -(-size // _ALIGNED) * _ALIGNED if fits else 0
    return places
