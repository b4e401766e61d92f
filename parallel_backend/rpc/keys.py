"""CURVE keys: who may speak to a backend over TCP, and that it is the backend that answers.

A folder holds both ends' pairs: `server.key_secret` stays with the backend's hosts, `client.key_secret` and `server.key` are
for those who use it. Source: ZeroMQ RFC 26 (CurveZMQ); the files are pyzmq's certificates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from ..command_line import command_line
from ..errors import ConfigError

SERVER, CLIENT = "server", "client"


@dataclass(frozen=True)
class Keys:
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Keys:
        """New pairs, whose secret halves only their user can read.

        Raises: ConfigError: there are keys already; whoever has them would be locked out.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.glob("*.key*")):
            raise ConfigError(f"{folder} holds keys already.", "Name another folder, or remove them first.")
        for name in (SERVER, CLIENT):
            zmq.auth.create_certificates(folder, name)
            (folder / f"{name}.key_secret").chmod(0o600)
        return cls(folder)

    def check(self) -> None:
        """Raises: ConfigError: what a backend needs is not there."""
        self._pair(f"{SERVER}.key_secret")
        self._pair(f"{CLIENT}.key")

    def guard(self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes]) -> ThreadAuthenticator:
        """Only clients with this folder's client key get through to `router`; stop what is returned at the end.

        Raises: ConfigError: a key is not there.
        """
        self.check()
        public, secret = self._pair(f"{SERVER}.key_secret")
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve(domain="*", location=str(self.folder))
        router.curve_publickey, router.curve_secretkey, router.curve_server = public, secret, True
        return authenticator

    def identify(self, socket: zmq.Socket[bytes]) -> None:
        """Makes `socket` a client of the backend that has this folder's server key. Raises: ConfigError."""
        server, _ = self._pair(f"{SERVER}.key")
        public, secret = self._pair(f"{CLIENT}.key_secret")
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, server

    def _pair(self, name: str) -> tuple[bytes, bytes]:
        try:
            public, secret = zmq.auth.load_certificate(self.folder / name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.folder / name} can't be read: {error}.",
                f"Make keys with `{command_line('keys', 'FOLDER')}` and copy them to both ends.",
            ) from None
        if name.endswith("_secret") and secret is None:
            raise ConfigError(f"{self.folder / name} has no secret key.", "Copy the whole file.")
        return public, secret or b""
