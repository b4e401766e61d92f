"""Tensors that came with a key: prompts, which are not sent again while they are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from ..errors import MissingTensorsError
from ..rpc.headers import TensorMeta

# Beside those of the last request that named any.
MOST_BYTES = 2**28


class KeptTensors:
    """Ranks have the same requests in the same order, so they keep and miss the same."""

    def __init__(self) -> None:
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def complete(self, metas: Sequence[TensorMeta], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """All tensors of a message but those that lie in memory; those sent with a key are kept, those named by it alone looked up.

        Raises: MissingTensorsError: some are not kept (any more).
        """
        for meta, tensor in zip(metas, tensors, strict=True):
            if meta.key is not None and tensor is not None:
                self._tensors[meta.key] = tensor
        here = [(meta, tensor) for meta, tensor in zip(metas, tensors, strict=True) if meta.shared is None]
        unsent = [meta.key for meta, tensor in here if tensor is None]
        missing = [name for name in unsent if name not in self._tensors]
        if missing:
            raise MissingTensorsError(
                f"The backend no longer holds {len(missing)} tensors that were named by key.", "Send all of them again."
            )
        full: list[Tensor | None] = []
        for meta, tensor in zip(metas, tensors, strict=True):
            if meta.key is not None:
                self._tensors.move_to_end(meta.key)
            full.append(tensor if tensor is not None or meta.shared is not None else self._tensors[str(meta.key)])
        named = {meta.key for meta in metas if meta.key is not None}
        # The next request of a sampling names the same, which therefore stay, however much they are.
        while named and self.nbytes > MOST_BYTES and (oldest := next(iter(self._tensors))) not in named:
            del self._tensors[oldest]
        return full

    def forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._tensors.pop(key, None)

    def clear(self) -> None:
        self._tensors.clear()
