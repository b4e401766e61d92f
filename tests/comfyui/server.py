"""A real ComfyUI server for tests, with this pack and the probe nodes installed, spoken to over its HTTP API."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rank_pool import free_port

from .installation import HERE, ComfyInstallation
from .listener import EDITOR, Listener, NodeTexts

PACK = HERE.parents[1]
START_SECONDS = 120


@dataclass
class Outcome:
    """What one prompt came to: `error` is ComfyUI's own record of it, None after success."""

    prompt_id: str
    outputs: dict[str, Any]
    error: dict[str, Any] | None
    executed: list[str]
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: int = 0
    texts: NodeTexts = field(default_factory=NodeTexts)
    interrupted: bool = False

    @property
    def message(self) -> str:
        return (self.error or {}).get("exception_message", "")


# Where users have it; tests that need it are skipped without.
GGUF_PACK = "custom_nodes/ComfyUI-GGUF"


class ComfyServer:
    def __init__(self, installation: ComfyInstallation, base: Path, models: Path, options: Sequence[str] = ()) -> None:
        self.base, self.options = base, options
        for folder in ("custom_nodes", "input", "output", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        _link(base / "models", models)
        _link(base / "custom_nodes" / "parallel-mmdit", PACK)
        _link(base / "custom_nodes" / "probe_nodes", HERE / "probe_nodes")
        if (gguf_pack := Path(installation.folder) / GGUF_PACK).is_dir():
            _link(base / GGUF_PACK, gguf_pack)
        self.installation = installation
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.begin()

    def begin(self) -> None:
        """Starts its process; `wait` comes before the first request."""
        arguments = ["--cpu", "--listen", "127.0.0.1", "--port", self.port, "--base-directory", self.base]
        arguments += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", *self.options]
        command = [self.installation.python, HERE / "launch.py", self.installation.folder, *arguments]
        # Without what the tests' own Python path adds: the pack must find itself.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        log = (self.base / "comfyui.log").open("ab")
        self.process = subprocess.Popen(
            list(map(str, command)), env=env, stdout=log, stderr=log, start_new_session=True
        )

    def wait(self) -> None:
        """Until it answers."""
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.get("/object_info/KSampler")
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None and time.monotonic() < deadline, self.log()[-3000:]
                time.sleep(0.3)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=30)

    def kill(self) -> None:
        """Without a chance to tidy up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=30)

    def log(self) -> str:
        return (self.base / "comfyui.log").read_text(errors="replace")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return json.loads(answer.read() or b"null")

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refused:
            return json.loads(refused.read())

    def run(
        self, prompt: dict[str, Any], *, preview: bool = False, interrupt_at_step: int = 0, timeout: float = 180
    ) -> Outcome:
        """Queues a prompt as an editor does and waits for its end.

        With `interrupt_at_step`, interrupts once that step is reported.
        """
        line = Listener(self.port, EDITOR, timeout=timeout)
        try:
            extra = {"preview_method": "latent2rgb"} if preview else {}
            queued = self.post("/prompt", {"prompt": prompt, "client_id": line.client_id, "extra_data": extra})
            if "prompt_id" not in queued:
                return Outcome("", {}, {"exception_message": json.dumps(queued)}, [])
            outcome = Outcome(queued["prompt_id"], {}, None, [], texts=line.texts)
            self._follow(line, outcome, interrupt_at_step)
        finally:
            line.close()
        return outcome

    def _follow(self, line: Listener, outcome: Outcome, interrupt_at_step: int) -> None:
        while True:
            event = line.receive()
            if isinstance(event, bytes):
                outcome.previews += int.from_bytes(event[:4], "big") in (1, 4)
                continue
            kind, data = event["type"], event["data"]
            if data.get("prompt_id") not in (None, outcome.prompt_id):
                continue
            if kind == "executed":
                outcome.outputs[data["node"]] = data["output"]
            elif kind == "executing" and data["node"] is not None:
                outcome.executed.append(data["node"])
            elif kind == "progress":
                outcome.progress.append((data["value"], data["max"]))
                if interrupt_at_step and data["value"] >= interrupt_at_step and data["max"] > 1:
                    interrupt_at_step = 0
                    self.post("/interrupt", {})
            elif kind == "execution_error":
                outcome.error = data
                return
            elif kind == "execution_interrupted":
                outcome.interrupted = True
                return
            elif kind == "execution_success":
                return


def _link(link: Path, target: Path) -> None:
    if not link.exists():
        link.symlink_to(target, target_is_directory=True)
