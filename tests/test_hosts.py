"""A backend that others than its user reach: over two hosts, and behind an address with keys."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from two_hosts import Seen

from parallel_backend import Backend, Conditioning, MeshSpec
from parallel_backend.__main__ import main
from parallel_backend.client import connection
from parallel_backend.errors import BackendLostError, ConfigError
from parallel_backend.rpc.keys import Keys
from parallel_backend.small_checkpoints.prompts import random_prompt

ROOT = Path(__file__).parents[1]


def test_two_hosts_sample_lose_the_link_and_sample_again(ran_beside: Seen | None) -> None:
    if ran_beside is None:
        pytest.skip("this user can't make network namespaces")
    assert ran_beside.hosts == list(ran_beside.names)
    assert re.search(f"RankError: .*rank 1 on {ran_beside.names[1]} has not been heard of", ran_beside.error), (
        ran_beside.error
    )
    assert ran_beside.equal
    assert "outside this backend's model folders" in ran_beside.outside
    assert ran_beside.statuses == [0, 0]


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
    with pytest.raises(ConfigError, match=r"server.key can't be read.*keys FOLDER"):
        Backend.attach_remote(address, tmp_path)
    with pytest.raises(ConfigError, match="has 1 ranks; 4 were asked for"):
        Backend.attach_remote(address, keys, world_size=4)


def test_a_port_without_keys_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def serve(*arguments: str) -> str:
        assert main(["serve", "--name", "open", "--listen", "tcp://0.0.0.0:5520", *arguments]) == 1
        return capsys.readouterr().err

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
