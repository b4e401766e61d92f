"""Messages as frames: a msgpack header of a known type, then each tensor's raw bytes. Nothing is ever unpickled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from ..errors import ProtocolError
from ..version import __version__
from .headers import ReplyHeader, RequestHeader, SharedPlace, SharedRoom, TensorMeta
from .messages import Decode, Encode, Forward, PatchFilePart, Reply, Request, Sample, TensorIndex
from .shared_memory import ALIGNED, is_shared_file

# A frame's memory is read-only, and so are the tensors made of it: they are copied to a device or cast, never written.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

# A ControlNet for each of SD3.5-Large's 38 blocks, or several of SDXL's 10 places, and a dozen others.
MAX_TENSORS = 100
MAX_FRAME_BYTES = 2**31
MAX_DIMS = 8
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Header = TypeVar("Header", RequestHeader, ReplyHeader)
Frame = bytes | bytearray | memoryview
# A tensor that travels, or what is said of one that lies in memory.
Sendable = Tensor | TensorMeta


class _Version(msgspec.Struct):
    version: str = "unknown"


def tensor_meta(
    tensor: Tensor, *, sent: bool = True, key: str | None = None, shared: SharedPlace | None = None
) -> TensorMeta:
    """Raises: ProtocolError: a dtype that does not travel."""
    if tensor.dtype not in _NAMES:
        raise ProtocolError(
            f"A tensor of {tensor.dtype} can't be sent.", f"Convert it to one of: {', '.join(_DTYPES)}."
        )
    return TensorMeta(_NAMES[tensor.dtype], list(tensor.shape), sent, key, shared)


def dtype_named(meta: TensorMeta) -> torch.dtype:
    """Raises: ProtocolError: no dtype that travels, or sizes that can't be."""
    sizes_known = len(meta.shape) <= MAX_DIMS and all(0 <= size <= MAX_FRAME_BYTES for size in meta.shape)
    if meta.dtype not in _DTYPES or not sizes_known:
        what = f"{meta.dtype[:40]!r} {meta.shape[:MAX_DIMS]}"
        raise ProtocolError(f"A tensor of {what} can't be read.", f"Send a known dtype and at most {MAX_DIMS} sizes.")
    return _DTYPES[meta.dtype]


def tensor_frame(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def pack(header: RequestHeader | ReplyHeader, tensors: Sequence[Tensor]) -> list[Frame]:
    """The frames of a message. `tensors` are those whose meta says `sent`, in order."""
    if len(header.tensors) > MAX_TENSORS:
        raise ProtocolError(f"{len(header.tensors)} tensors in one message.", f"Send at most {MAX_TENSORS}.")
    return [msgspec.msgpack.encode(header), *(tensor_frame(tensor) for tensor in tensors)]


def unpack(frames: Sequence[Frame], kind: type[Header]) -> tuple[Header, list[Tensor | None]]:
    """The header and its tensors; None in the place of one that is named by its key alone, or lies in memory.

    Raises: ProtocolError: another version, an unknown message or field, or frames that don't fit the header.
    """
    if not frames:
        raise ProtocolError("An empty message came.", "Send a header frame.")
    if kind is RequestHeader:
        _check_version(frames[0])
    try:
        header = msgspec.msgpack.decode(frames[0], type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"A message can't be read: {error}.", "Use client and backend of one version.") from None
    sent = sum(meta.sent for meta in header.tensors)
    if sent != len(frames) - 1 or len(header.tensors) > MAX_TENSORS:
        raise ProtocolError(
            f"A message names {sent} tensors and carries {len(frames) - 1} frames.", "Send one frame per tensor."
        )
    if kind is RequestHeader and (
        wrong := [i for i in _tensor_indices(header.body) if not 0 <= i < len(header.tensors)]
    ):
        raise ProtocolError(
            f"A message points at tensor {wrong[0]} of {len(header.tensors)}.", "Point at tensors that travel with it."
        )
    if any(meta.shared is not None and (meta.sent or meta.key is not None) for meta in header.tensors):
        raise ProtocolError("A tensor lies in memory and is sent or kept as well.", "Say one of them.")
    if isinstance(header, RequestHeader) and header.room is not None:
        _check_room(header.room)
    rest = iter(frames[1:])
    return header, [_tensor(meta, next(rest)) if meta.sent else None for meta in header.tensors]


def _check_room(room: SharedRoom) -> None:
    if not is_shared_file(room.name):
        raise ProtocolError(f"{room.name[:80]!r} is no file of a client's.", "Name one that a client has written.")
    if room.start < 0 or room.start % ALIGNED or not 0 <= room.nbytes <= MAX_FRAME_BYTES:
        raise ProtocolError(
            f"A reply has {room.nbytes} bytes of room from byte {room.start} on.",
            f"Begin at a multiple of {ALIGNED}; at most {MAX_FRAME_BYTES} bytes.",
        )


def _check_version(frame: Frame) -> None:
    try:
        version = msgspec.msgpack.decode(frame, type=_Version).version
    except (msgspec.DecodeError, msgspec.ValidationError):
        raise ProtocolError(
            "A message has no readable header.", "Speak msgpack as parallel_backend.rpc does."
        ) from None
    if version != __version__:
        raise ProtocolError(
            f"A message of version {version} came; this backend is version {__version__}.",
            "Start the older of both again, ComfyUI or the backend: both ends must be of one version.",
        )


def _tensor(meta: TensorMeta, frame: Frame) -> Tensor:
    dtype = dtype_named(meta)
    expected = prod(meta.shape) * dtype.itemsize  # Python's numbers: a lie about sizes must not wrap around
    if len(frame) != expected:
        raise ProtocolError(
            f"A frame has {len(frame)} bytes where {meta.dtype} {meta.shape} needs {expected}.", "Send whole tensors."
        )
    return torch.frombuffer(frame, dtype=dtype).view(meta.shape) if expected else torch.empty(meta.shape, dtype=dtype)


def _tensor_indices(body: Request | Reply) -> list[TensorIndex]:
    """Every place at which a request points into its tensors; replies have none."""
    if isinstance(body, Sample):
        chosen = [body.latent, body.mask, body.noise, body.sigmas]
        of_extras = [i for e in (*body.extras, *body.uncond_extras, *body.weaker) for i in e.tensors()]
        return [i for p in body.prompts for i in p.tensors] + [i for i in chosen if i is not None] + of_extras
    if isinstance(body, Forward):
        hints = [use.hint for use in body.controls]
        later = [extra for one in body.later for extra in one.extras]
        of_extras = [i for extra in (*body.extras, *later) for i in extra.tensors()]
        return [body.x, body.timesteps, body.context, body.pooled, *body.control.indices, *hints, *of_extras]
    if isinstance(body, Decode):
        return [body.latent]
    if isinstance(body, PatchFilePart):
        return [body.data]
    return [body.image] if isinstance(body, Encode) else []
