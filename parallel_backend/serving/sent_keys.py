"""Which connection has sent which kept tensors, so that they can be freed with it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

# A connection names a few at a time, with SD3.5's adapter of image prompts 80; one that was killed never says goodbye. What is not remembered here stays with the
# ranks until other tensors push it out.
MOST_KEYS, MOST_CLIENTS = 256, 256


class SentKeys:
    def __init__(self) -> None:
        self._of: OrderedDict[bytes, OrderedDict[str, None]] = OrderedDict()

    def note(self, client: bytes, keys: Iterable[str]) -> list[str]:
        """The connection has sent these; what is to be freed for it: the tensors of one not heard of for longest."""
        own = self._of.setdefault(client, OrderedDict())
        self._of.move_to_end(client)
        for key in keys:
            own[key] = None
        while len(own) > MOST_KEYS:
            own.popitem(last=False)
        return self.forget(next(iter(self._of))) if len(self._of) > MOST_CLIENTS else []

    def forget(self, client: bytes) -> list[str]:
        """The connection is closed; its keys."""
        return sorted(self._of.pop(client, ()))
