"""A backend over two hosts, made of network namespaces: a client behind keys, a cut link, and the picture after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from parallel_backend.rpc.keys import Keys
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "10.177.0.1", "10.177.0.2"

CLIENT = """
import json, subprocess, sys, time, torch
from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.small_checkpoints.prompts import random_prompt
address, keys, checkpoint, second = sys.argv[1:]
backend = Backend.attach_remote(address, keys)
hosts = [rank.host for rank in backend.status().ranks]
model = backend.load_model(checkpoint, MeshSpec(cfg=2), "float32")
prompt = Conditioning(*random_prompt(1, 77))
def sample(**settings):
    return model.sample(torch.zeros(1, 16, 16, 16), prompt, prompt, **({"steps": 3, "seed": 1} | settings))
def link(state):
    subprocess.run(["ip", "-n", second, "link", "set", "eth0", state], check=True)
before = sample()
try:
    sample(steps=10000, on_step=lambda step: step.index == 1 and link("down"))
    error = ""
except Exception as lost:
    error = f"{type(lost).__name__}: {lost}"
link("up")
again, tries = None, 0
while again is None:
    tries += 1
    try:
        again = sample()
    except Exception as lost:
        assert tries < 20, lost
        time.sleep(2)
try:
    backend.load_model(checkpoint, MeshSpec(tp=2), name="../../etc/hostname")
except Exception as refused:
    outside = str(refused)
backend.stop()
print(json.dumps({"hosts": hosts, "error": error, "equal": torch.equal(before, again), "outside": outside}))
"""


@dataclass(frozen=True)
class Seen:
    """What a client saw: `names` are the two hosts, `statuses` with what their commands ended."""

    names: tuple[str, str]
    hosts: list[str]
    error: str
    equal: bool
    outside: str
    statuses: list[int]


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@contextmanager
def joined_hosts() -> Iterator[tuple[str, str] | None]:
    """Two network namespaces, joined by a cable whose second end is named eth0 as the first; None where that may not be made."""
    first, second = names = (f"pm{os.getpid()}a", f"pm{os.getpid()}b")
    try:
        if not all(ip("netns", "add", name) for name in names):
            yield None
            return
        assert ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in ((first, FIRST), (second, SECOND)):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "lo", "up") and ip("-n", name, "link", "set", "eth0", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def on_host(name: str, runtime: Path, command: list[str]) -> list[str]:
    """The command in that network namespace, with a host name of its own."""
    inner = f"hostname {name}; export PARALLEL_MMDIT_RUNTIME_DIR={runtime}; exec " + " ".join(command)
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inner]


def run_two_hosts() -> Seen | None:
    """Samples, loses the link and samples again; None where this user can't make network namespaces."""
    with joined_hosts() as names, tempfile.TemporaryDirectory(prefix="pmh-") as folder:
        return None if names is None else _run(names, Path(folder))


def _run(names: tuple[str, str], folder: Path) -> Seen:
    keys, models = Keys.make(folder / "keys").folder, folder / "models"
    checkpoint = write_mmdit(models / "model.safetensors", small_config("sd3.5-large"))
    serve = [sys.executable, "-m", "parallel_backend", "serve", "--name", "hosts", "--world-size", "1"]
    serve += ["--device", "cpu", "--hosts", "2", "--rendezvous", f"{FIRST}:29517", "--interface", "eth0"]
    serve += ["--models", str(models), "--listen", "tcp://0.0.0.0:5517", "--keys", str(keys)]
    running = []
    for index, name in enumerate(names):
        runtime = folder / name
        runtime.mkdir()
        command = on_host(name, runtime, [*serve, "--host-index", str(index)])
        with (folder / f"{name}.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True))
    try:
        log_of_first = folder / f"{names[0]}.log"
        deadline = time.monotonic() + 120
        while "ready: 2 ranks" not in log_of_first.read_text():
            assert time.monotonic() < deadline and running[0].poll() is None, log_of_first.read_text()
            time.sleep(0.5)
        command = ["ip", "netns", "exec", names[0], sys.executable, "-c", CLIENT]
        command += [f"tcp://{FIRST}:5517", str(keys), str(checkpoint), names[1]]
        client = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
        assert client.returncode == 0, client.stderr[-3000:] + log_of_first.read_text()[-2000:]
        told = json.loads(client.stdout)
        return Seen(names, **told, statuses=[process.wait(30) for process in running])
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
