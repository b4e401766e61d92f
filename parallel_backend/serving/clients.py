"""Who is connected to a backend: each says Hello, and is gone with its Goodbye or with the end of its connection."""

from __future__ import annotations

import time

from ..rpc.messages import Hello

# Who has started a backend is about to connect: it is not taken away from under it.
START_GRACE = 2.0


class Clients:
    """By connection. A process that was killed says nothing, but the kernel closes its socket."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Hello, int]] = {}
        self._begun, self._anybody = time.monotonic(), False

    def note(self, connection: bytes, hello: Hello, descriptor: int) -> None:
        """`descriptor` is of the socket that it came by."""
        self._known[connection] = hello, descriptor
        self._anybody = True

    def leave(self, connection: bytes) -> None:
        self._known.pop(connection, None)

    def cut(self, descriptor: int) -> None:
        """The socket of that number was closed."""
        gone = [connection for connection, (_, own) in self._known.items() if own == descriptor]
        for connection in gone:
            del self._known[connection]

    def name(self, connection: bytes) -> str:
        """Empty where it has said no Hello."""
        return self._known[connection][0].client if connection in self._known else ""

    def names(self) -> list[str]:
        """Each process once."""
        return list(dict.fromkeys(hello.client for hello, _ in self._known.values()))

    def nobody_but(self, client: str, machine: str) -> bool:
        """Whether no other process is connected, or has just had this backend started."""
        if not self._anybody and time.monotonic() - self._begun < START_GRACE:
            return False
        return all((hello.client, hello.machine) == (client, machine) for hello, _ in self._known.values())
