"""A backend over two hosts, made of network namespaces: a client behind keys, a cut link, and the picture after it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.client import connection
from parallel_backend.errors import BackendLostError, ConfigError
from parallel_backend.rpc.keys import Keys
from parallel_backend.small_checkpoints.prompts import random_prompt

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "10.177.0.1", "10.177.0.2"
NAMES = (f"pm{os.getpid()}a", f"pm{os.getpid()}b")


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[str, str]]:
    """Two network namespaces, joined by a cable whose second end is named eth0 as the first."""
    if not all(ip("netns", "add", name) for name in NAMES):
        pytest.skip("this user can't make network namespaces")
    first, second = NAMES
    try:
        assert ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in ((first, FIRST), (second, SECOND)):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "lo", "up") and ip("-n", name, "link", "set", "eth0", "up")
        yield first, second
    finally:
        for name in NAMES:
            ip("netns", "del", name)


def on_host(name: str, runtime: Path, command: list[str]) -> list[str]:
    """The command in that network namespace, with a host name of its own."""
    inner = f"hostname {name}; export PARALLEL_MMDIT_RUNTIME_DIR={runtime}; exec " + " ".join(command)
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", inner]


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


def test_two_hosts_sample_lose_the_link_and_sample_again(link: tuple[str, str], models: Path, tmp_path: Path) -> None:
    keys, folder = Keys.make(tmp_path / "keys").folder, models / "diffusion_models"
    serve = [
        sys.executable,
        "-m",
        "parallel_backend",
        "serve",
        "--name",
        "hosts",
        "--world-size",
        "1",
        "--device",
        "cpu",
    ]
    serve += ["--hosts", "2", "--rendezvous", f"{FIRST}:29517", "--interface", "eth0", "--models", str(folder)]
    serve += ["--listen", "tcp://0.0.0.0:5517", "--keys", str(keys)]
    running = []
    for index, name in enumerate(link):
        runtime, log = tmp_path / name, (tmp_path / f"{name}.log").open("w")
        runtime.mkdir()
        command = on_host(name, runtime, [*serve, "--host-index", str(index)])
        running.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True))
    try:
        log = tmp_path / f"{link[0]}.log"
        deadline = time.monotonic() + 120
        while "ready: 2 ranks" not in log.read_text():
            assert time.monotonic() < deadline and running[0].poll() is None, log.read_text()
            time.sleep(0.5)
        checkpoint = str(folder / "sd3.5-large.safetensors")
        command = ["ip", "netns", "exec", link[0], sys.executable, "-c", CLIENT]
        command += [f"tcp://{FIRST}:5517", str(keys), checkpoint, link[1]]
        client = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)
        assert client.returncode == 0, client.stderr[-3000:] + log.read_text()[-2000:]
        told = json.loads(client.stdout)
        assert told["hosts"] == list(link)
        assert re.search(f"RankError: .*rank 1 on {link[1]} has not been heard of", told["error"]), told["error"]
        assert told["equal"]
        assert "outside this backend's model folders" in told["outside"]
        assert [process.wait(30) for process in running] == [0, 0]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def guarded(runtime_folder: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A backend that listens on loopback: its address, and its keys."""
    keys, port = Keys.make(tmp_path_factory.mktemp("keys")).folder, 5518
    serve = [
        sys.executable,
        "-m",
        "parallel_backend",
        "serve",
        "--name",
        "guarded",
        "--world-size",
        "1",
        "--device",
        "cpu",
    ]
    serve += ["--listen", f"tcp://127.0.0.1:{port}", "--keys", str(keys), "--models", str(models / "diffusion_models")]
    subprocess.run([*serve, "--detach", "--metrics-port", "5519"], check=True, cwd=ROOT, capture_output=True)
    yield f"tcp://127.0.0.1:{port}", keys
    Backend.attach("guarded").stop()


def test_who_has_the_keys_samples_as_a_local_client_does(guarded: tuple[str, Path], models: Path) -> None:
    address, keys = guarded
    checkpoint, prompt = models / "diffusion_models" / "sd3.5-large.safetensors", Conditioning(*random_prompt(1, 77))
    pictures = []
    for backend in (Backend.attach_remote(address, keys), Backend.attach("guarded")):
        model = backend.load_model(checkpoint, MeshSpec(), "float32")
        pictures.append(model.sample(torch.zeros(1, 16, 16, 16), prompt, None, steps=2))
        backend.close()
    assert torch.equal(*pictures)


def test_another_key_or_none_gets_no_answer(
    guarded: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONTROL_SECONDS", 3.0)
    address, keys = guarded
    others = Keys.make(tmp_path / "others").folder
    (others / "server.key").write_bytes((keys / "server.key").read_bytes())
    with pytest.raises(BackendLostError, match=r"has not answered for 3 s.*keys are its own"):
        Backend.attach_remote(address, others)
    with pytest.raises(ConfigError, match=r"server.key can't be read.*parallel-mmdit keys"):
        Backend.attach_remote(address, tmp_path)
    with pytest.raises(ConfigError, match="has 1 ranks; 4 were asked for"):
        Backend.attach_remote(address, keys, world_size=4)


def test_a_port_without_keys_is_refused(tmp_path: Path) -> None:
    def serve(*arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "parallel_backend",
            "serve",
            "--name",
            "open",
            "--listen",
            "tcp://0.0.0.0:5520",
        ]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=ROOT).stderr

    assert "is not listened on without keys" in serve()
    assert "Name the model folders with --models" in serve("--keys", str(tmp_path))


def test_keys_are_for_their_user_alone_and_never_overwritten(tmp_path: Path) -> None:
    Keys.make(tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "k").glob("*_secret"))
    with pytest.raises(ConfigError, match="holds keys already"):
        Keys.make(tmp_path / "k")


def test_the_metrics_page_has_the_numbers_of_status(guarded: tuple[str, Path]) -> None:
    from urllib.request import urlopen

    page = urlopen("http://127.0.0.1:5519/metrics", timeout=10).read().decode()
    state = Backend.attach("guarded").status()
    assert f"parallel_mmdit_jobs_total {float(state.jobs_done)}" in page
    assert re.search(r'parallel_mmdit_used_bytes\{device="cpu",host="[^"]+",rank="0"\} \d', page)
