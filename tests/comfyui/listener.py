"""A client on ComfyUI's websocket, as an editor or as a program that knows only ComfyUI's oldest messages."""

from __future__ import annotations

import json
import uuid
from typing import Any

import websocket

# What ComfyUI's own editor tells of itself when it connects.
EDITOR = {
    "supports_preview_metadata": True,
    "supports_manager_v4_ui": True,
    "supports_progress_text_metadata": True,
}
TEXT_FRAME = 3


class NodeTexts(dict[str, list[str]]):
    """The lines that each node was sent, by its id."""

    def add(self, frame: bytes) -> None:
        """Takes up a frame of text; leaves those of other kinds."""
        if int.from_bytes(frame[:4], "big") == TEXT_FRAME:
            end = 8 + int.from_bytes(frame[4:8], "big")
            self.setdefault(frame[8:end].decode(), []).append(frame[end:].decode())


class Listener:
    """Connected once it is made; with `flags`, ComfyUI has answered them."""

    def __init__(
        self, port: str, flags: dict[str, bool] | None = None, client_id: str = "", timeout: float = 180
    ) -> None:
        self.client_id = client_id or uuid.uuid4().hex
        self._line = websocket.create_connection(f"ws://127.0.0.1:{port}/ws?clientId={self.client_id}", timeout=timeout)
        self.texts = NodeTexts()
        self.frames: list[bytes] = []
        self.events: list[dict[str, Any]] = []
        self.until("status")
        if flags:
            self._line.send(json.dumps({"type": "feature_flags", "data": flags}))
            self.until("feature_flags")

    def receive(self) -> bytes | dict[str, Any]:
        """The next frame, or the next event."""
        message = self._line.recv()
        if isinstance(message, bytes):
            self.texts.add(message)
            self.frames.append(message)
            return message
        event = json.loads(message)
        self.events.append(event)
        return event

    def until(self, kind: str) -> dict[str, Any]:
        """The data of the next event of that kind."""
        while True:
            event = self.receive()
            if isinstance(event, dict) and event["type"] == kind:
                return event["data"]

    def until_idle(self) -> None:
        """Until a prompt has been queued and none is left: all that ComfyUI sent to anybody before has arrived."""
        queued = False
        while True:
            left = self.until("status")["status"]["exec_info"]["queue_remaining"]
            if queued and not left:
                return
            queued = queued or left > 0

    def until_done(self, prompt_id: str) -> None:
        """Until a prompt that this client queued has ended and is in the history."""
        while (event := self.until("executing"))["node"] is not None or event["prompt_id"] != prompt_id:
            pass

    def close(self) -> None:
        self._line.close()
