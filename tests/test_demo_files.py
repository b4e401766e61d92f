"""The demo's weights where they are not beside the package: fetched from a real server, checked, and found again."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rank_pool import free_port

from parallel_backend.demo import files
from parallel_backend.demo.files import FILES, DemoFile, cache_folder, present
from parallel_backend.demo.trained import SHIPPED
from parallel_backend.errors import CheckpointError
from parallel_backend.version import __version__

BODY = bytes(range(256)) * 12_000
FILE = DemoFile("diffusion_models", "small.safetensors", len(BODY), hashlib.sha256(BODY).hexdigest())


class Release(BaseHTTPRequestHandler):
    """Gives `body` and counts; says that it is of `promised` bytes."""

    body, promised, status, asked = BODY, len(BODY), 200, 0
    both = threading.Barrier(1)

    def do_GET(self) -> None:
        type(self).asked += 1
        self.both.wait(timeout=30)
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.promised))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Release]]:
    """A release, and a package and a cache without any file."""

    class Own(Release):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(files, "RELEASE", f"http://127.0.0.1:{server.server_address[1]}/v0")
    monkeypatch.setattr(files, "MODELS", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Own
    server.shutdown()
    server.server_close()


def test_the_table_is_true_of_the_clones_files() -> None:
    shipped = {path.name: path for path in files.MODELS.rglob("*.safetensors")}
    assert shipped.keys() == FILES.keys()
    for name, file in FILES.items():
        body = shipped[name].read_bytes()
        assert (file.shipped, file.size, file.sha256) == (shipped[name], len(body), hashlib.sha256(body).hexdigest())
        assert file.url.endswith(f"/releases/download/v{__version__}/{name}")


def test_a_clone_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RELEASE", f"http://127.0.0.1:{free_port()}")
    for trained in SHIPPED.values():
        assert all(path.is_relative_to(files.MODELS) for path in (trained.path, *trained.vae))


def test_a_file_is_fetched_once_and_found_again(release: type[Release], capsys: pytest.CaptureFixture[str]) -> None:
    assert present(FILE).read_bytes() == BODY
    assert present(FILE) == cache_folder() / FILE.name and release.asked == 1
    assert capsys.readouterr().err == f"Fetching small.safetensors, 2.9 MiB, from {files.RELEASE}/small.safetensors\n"


def test_a_file_put_there_by_hand_is_taken_and_a_damaged_one_is_not(release: type[Release]) -> None:
    kept = cache_folder() / FILE.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(BODY)
    assert present(FILE) == kept and release.asked == 0
    kept.write_bytes(BODY[:-1] + b"\0")
    assert present(FILE).read_bytes() == BODY and release.asked == 1


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"body": BODY[:5000]}, r"IncompleteRead|5000 of 3072000 bytes came"),
        ({"body": BODY[:5000], "promised": 5000}, "5000 of 3072000 bytes came"),
        ({"body": BODY + BODY, "promised": 2 * len(BODY)}, "more than its 3072000 bytes came"),
        ({"body": b"\0" * len(BODY)}, f"its sha256 is [0-9a-f]{{64}}, not {FILE.sha256}"),
        ({"status": 404}, "HTTP Error 404: Not Found"),
    ],
    ids=["cut short", "too small", "too large", "another file", "not there"],
)
def test_what_is_not_the_file_is_named_and_leaves_nothing(
    given: dict[str, object], what: str, release: type[Release]
) -> None:
    for name, value in given.items():
        setattr(release, name, value)
    with pytest.raises(CheckpointError, match=what) as caught:
        present(FILE)
    assert f"{files.RELEASE}/small.safetensors" in caught.value.message
    assert str(cache_folder() / FILE.name) in caught.value.remedy
    assert list(cache_folder().iterdir()) == []


def test_no_way_to_the_release_is_named(release: type[Release], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RELEASE", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(CheckpointError, match="Connection refused"):
        present(FILE)


def test_a_cache_that_cant_be_written_to_is_named(release: type[Release], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "cache"))):
        present(FILE)


def test_what_ends_a_fetch_leaves_nothing(release: type[Release]) -> None:
    def interrupted(file: DemoFile, done: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        present(FILE, interrupted)
    assert list(cache_folder().iterdir()) == []


def test_two_at_once_both_get_it(release: type[Release]) -> None:
    release.both = threading.Barrier(2)
    found: list[bytes] = []
    readers = [threading.Thread(target=lambda: found.append(present(FILE).read_bytes())) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=60)
    assert found == [BODY, BODY] and release.asked == 2
    assert list(cache_folder().iterdir()) == [cache_folder() / FILE.name]
