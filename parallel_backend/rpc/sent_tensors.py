"""Which tensors the backend holds already, so that an unchanged prompt is sent once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .messages import TensorMeta
from .wire import tensor_hash, tensor_meta

REMEMBERED = 16


@dataclass(frozen=True)
class Attachment:
    """A tensor of a request; `kept` ones are sent once and then named by their hash."""

    tensor: Tensor
    kept: bool = False


class SentTensors:
    """Which tensors the backend has, so that an unchanged prompt is compared, not sent and not hashed again."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._sent: set[str] = set()

    def _hash_of(self, tensor: Tensor) -> str:
        for known_hash, known in reversed(self._known.items()):
            if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor.cpu()):
                self._known.move_to_end(known_hash)
                return known_hash
        new_hash = tensor_hash(tensor)
        # A copy: the caller may write into its own tensor, and must not be taken for unchanged then.
        self._known[new_hash] = tensor.detach().cpu().clone()
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return new_hash

    def note_sent(self, hashes: Sequence[str]) -> None:
        self._sent.update(hashes)

    def forget(self, hashes: Sequence[str] | None = None) -> None:
        self._sent.difference_update(self._sent.copy() if hashes is None else hashes)

    def prepare(self, attachments: Sequence[Attachment]) -> tuple[list[TensorMeta], list[Tensor], list[str]]:
        metas, sent, hashes = [], [], []
        for attachment in attachments:
            tensor, kept_hash = attachment.tensor, None
            if attachment.kept:
                kept_hash = self._hash_of(tensor)
            known = kept_hash is not None and (kept_hash in self._sent or kept_hash in hashes)
            metas.append(tensor_meta(tensor, sent=not known, hash=kept_hash))
            if not known:
                sent.append(tensor)
                if kept_hash is not None:
                    hashes.append(kept_hash)
        return metas, sent, hashes
