"""Which tensors the backend holds already, so that an unchanged prompt is sent once."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ..rpc.messages import TensorMeta
from ..rpc.wire import tensor_frame, tensor_meta

REMEMBERED = 8

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"


@dataclass(frozen=True)
class Attachment:
    """A tensor of a request; `kept` ones are sent once and then named by their key."""

    tensor: Tensor
    kept: bool = False


class SentTensors:
    """Copies of the tensors that were sent to be kept. Comparing with them is five times as fast as a content hash."""

    def __init__(self) -> None:
        self._client = uuid.uuid4().hex
        self._count = 0
        self._copies: OrderedDict[str, tuple[object, Words]] = OrderedDict()
        self._sent: set[str] = set()

    def prepare(self, attachments: Sequence[Attachment]) -> tuple[list[TensorMeta], list[Tensor], list[str]]:
        """What the message says of its tensors, those that must travel with it, and the keys among these."""
        metas, sent, keys = [], [], []
        for attachment in attachments:
            tensor = attachment.tensor
            key = self._key_of(tensor.detach().cpu()) if attachment.kept else None
            known = key is not None and (key in self._sent or key in keys)
            metas.append(tensor_meta(tensor, sent=not known, key=key))
            if not known:
                sent.append(tensor)
                if key is not None:
                    keys.append(key)
        return metas, sent, keys

    def note_sent(self, keys: Iterable[str]) -> None:
        """The backend has answered a request that brought these."""
        self._sent.update(keys)

    def forget(self) -> None:
        """The backend may hold none of them."""
        self._sent.clear()

    def _key_of(self, tensor: Tensor) -> str:
        # In numpy: torch would wake its threads, which then spin for a while on the ranks' cores.
        data = _words(np.asarray(tensor_frame(tensor)))
        kind = (tensor.dtype, tensor.shape, int(data.sum()))
        for key, (copy_kind, copy) in reversed(self._copies.items()):
            if copy_kind == kind and np.array_equal(copy, data):
                self._copies.move_to_end(key)
                return key
        self._count += 1
        key = f"{self._client}-{self._count}"
        if len(self._copies) == REMEMBERED:  # before the copy, which then finds its memory free and mapped
            self._sent.discard(self._copies.popitem(last=False)[0])
        # The caller may write into its own tensor, and must not be taken for unchanged then.
        self._copies[key] = kind, data.copy()
        return key


def _words(data: np.ndarray[Any, np.dtype[Any]]) -> Words:
    """The bytes as 64-bit words, the last one filled up: eight times fewer to add and compare."""
    if data.size % 8:
        data = np.concatenate([data, np.zeros(8 - data.size % 8, np.uint8)])
    return data.view(np.uint64)
