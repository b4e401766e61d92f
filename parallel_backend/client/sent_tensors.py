"""Which tensors the backend holds already, so that an unchanged prompt is sent once."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ProtocolError
from ..rpc.headers import SharedPlace, SharedRoom, TensorMeta
from ..rpc.host_copies import on_host
from ..rpc.wire import tensor_frame, tensor_meta
from .shared_area import SharedArea

# Two prompts of two tensors each, and the hints of their ControlNets; twice. More, where one request names more.
REMEMBERED = 16
# One word of so many tells two prompts apart.
LOOKED_AT = 61

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"


@dataclass(frozen=True)
class Attachment:
    """A tensor of a request; `kept` ones are sent once and then named by their key, `shared` ones lie in memory where they can.

    A `lasting` one isn't compared with what was sent while torch says that nothing was written into it.
    """

    tensor: Tensor
    kept: bool = False
    shared: bool = False
    lasting: bool = False

    @property
    def version(self) -> int | None:
        """Another one after each writing; None where that isn't known."""
        return None if not self.lasting or self.tensor.is_inference() else self.tensor._version


class SentTensors:
    """Copies of the tensors that were sent to be kept. Comparing with them is five times as fast as a content hash.

    Args:
        area: for ranks of this machine, in which shared tensors are laid; None where all go by the socket.
    """

    def __init__(self, area: SharedArea | None = None) -> None:
        self.area = area
        self._client = uuid.uuid4().hex
        self._count = 0
        self._copies: OrderedDict[str, tuple[object, Words]] = OrderedDict()
        self._sent: set[str] = set()
        self._unread: MutableMapping[Tensor, tuple[int, str]] = WeakIdKeyDictionary()

    def prepare(self, attachments: Sequence[Attachment]) -> tuple[list[TensorMeta], list[Tensor], list[str]]:
        """What the message says of its tensors, those that must travel with it, and the keys among these."""
        metas, sent, keys = [], [], []
        hosted = on_host([attachment.tensor.detach() for attachment in attachments])
        here = list(zip(attachments, hosted, strict=True))
        places = self._laid([tensor for attachment, tensor in here if attachment.shared])
        for attachment, tensor in here:
            if attachment.shared and places:
                metas.append(tensor_meta(tensor, sent=False, shared=places.pop(0)))
                continue
            key = self._key_of(attachment, tensor, metas) if attachment.kept else None
            known = key is not None and (key in self._sent or key in keys)
            metas.append(tensor_meta(tensor, sent=not known, key=key))
            if not known:
                sent.append(tensor)
                if key is not None:
                    keys.append(key)
        return metas, sent, keys

    def _laid(self, tensors: Sequence[Tensor]) -> list[SharedPlace]:
        return (self.area.lay(tensors) or []) if tensors and self.area is not None else []

    def room(self, nbytes: int) -> SharedRoom | None:
        """Where ranks of this machine may lay the reply to the request that was prepared last."""
        return self.area.room(nbytes) if self.area is not None else None

    def read(self, meta: TensorMeta) -> Tensor:
        """A reply's tensor that has no frame. Raises: ProtocolError: it is nowhere here."""
        if self.area is None or meta.shared is None:
            raise ProtocolError("A reply names a tensor that didn't come.", "Use client and backend of one version.")
        return self.area.read(meta)

    def give_up(self) -> None:
        """The last request may go on, unheard, and write its result where the next one would lie: that lies elsewhere."""
        if self.area is not None:
            self.area.close()

    def note_sent(self, keys: Iterable[str]) -> None:
        """The backend has answered a request that brought these."""
        self._sent.update(keys)

    def forget(self) -> None:
        """The backend may hold none of them."""
        self._sent.clear()

    def _key_of(self, attachment: Attachment, tensor: Tensor, before: Sequence[TensorMeta]) -> str:
        """Of a tensor of a request; the copies of those that came before it there stay.

        One of a known version has its key without being read.
        """
        version = attachment.version
        if version is None:
            return self._key_by_value(tensor, before)
        known = self._unread.get(attachment.tensor)
        if known is not None and known[0] == version and known[1] in self._copies:
            self._copies.move_to_end(known[1])
            return known[1]
        key = self._key_by_value(tensor, before)
        self._unread[attachment.tensor] = version, key
        return key

    def _key_by_value(self, tensor: Tensor, before: Sequence[TensorMeta]) -> str:
        # In numpy: torch would wake its threads, which then spin for a while on the ranks' cores.
        data = _words(np.asarray(tensor_frame(tensor)))
        # Tells others apart as a rule; what it takes for the same is compared in full.
        kind = (tensor.dtype, tensor.shape, int(data[::LOOKED_AT].sum()))
        for key, (copy_kind, copy) in reversed(self._copies.items()):
            if copy_kind == kind and np.array_equal(copy, data):
                self._copies.move_to_end(key)
                return key
        self._count += 1
        key = f"{self._client}-{self._count}"
        named = {meta.key for meta in before}
        # Before the copy, which then finds its memory free and mapped.
        while len(self._copies) >= REMEMBERED and (oldest := next(iter(self._copies))) not in named:
            del self._copies[oldest]
            self._sent.discard(oldest)
        # The caller may write into its own tensor, and must not be taken for unchanged then.
        self._copies[key] = kind, data.copy()
        return key


def _words(data: np.ndarray[Any, np.dtype[Any]]) -> Words:
    """The bytes as 64-bit words, the last one filled up: eight times fewer to add and compare."""
    if data.size % 8:
        data = np.concatenate([data, np.zeros(8 - data.size % 8, np.uint8)])
    return data.view(np.uint64)
