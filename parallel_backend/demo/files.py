"""The demo's weights: in a clone and in a wheel beside this file; elsewhere fetched when first used, from this version's release.

What ComfyUI's registry installs is without them: they weigh ten times as much as all the rest.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint_files.taesd_files import DECODER, ENCODER
from ..errors import CheckpointError
from ..version import __version__

MODELS = Path(__file__).parent / "models"
# A folder of its own in each of ComfyUI's, so that no file takes the name of a real one.
OWN = "parallel_demo"
# Each side of the pictures that its models were trained on, or nearly (160 x 96). They draw other sizes badly.
PIXELS = 128
RELEASE = f"https://github.com/parallel-mmdit/parallel-mmdit/releases/download/v{__version__}"
SILENT_SECONDS = 30.0
_BLOCK = 2**20

# Called with the bytes that have come, at first 0; what it raises ends the fetch.
Fetching = Callable[["DemoFile", int], object]


@dataclass(frozen=True)
class DemoFile:
    """As it is published; `folder` is the one of ComfyUI's models in which it would lie."""

    folder: str
    name: str
    size: int
    sha256: str

    @property
    def listed(self) -> str:
        """Its name in loaders and workflows."""
        return f"{OWN}/{self.name}"

    @property
    def shipped(self) -> Path:
        """Where it lies in a clone and in a wheel."""
        return MODELS / self.folder / OWN / self.name

    @property
    def url(self) -> str:
        return f"{RELEASE}/{self.name}"


_MODEL, _CONTROL, _VAE = "diffusion_models", "controlnet", "vae_approx"
# As the release has them; a test holds this table to the files of the clone.
_PUBLISHED = (
    (_MODEL, "mmdit.safetensors", 23479488, "2ac93b299e09c2c3cde184c8fe2a8301888b5ccc5602212d76ee95623f20fbcd"),
    (_MODEL, "unet.safetensors", 21924304, "58a68754c93df4b7c1ecfff3076d52fbf363085fcb483e320066918c20d4ac7b"),
    (_CONTROL, "controlnet.safetensors", 8717928, "226aa97ccdbc387fac45c4180342e1ba7415989123e28b1460ec3286487b81ab"),
    (_VAE, "taesd3_decoder.safetensors", 2464382, "3a009735a158fd03ccd14ef37afb18c96caae513190a4d9f7ba7c70b3308099b"),
    (_VAE, "taesd3_encoder.safetensors", 2464384, "b4bb0315866ab9ec16d261fe6999481cb1ada1409b3feca3be358297a7ea210b"),
    (_VAE, "taesdxl_decoder.safetensors", 2450550, "c2a9c8998292411422186c736510808fbd89b10b7f8c8b206417204d40f71c81"),
    (_VAE, "taesdxl_encoder.safetensors", 2450536, "23231e11e70ffc49fa2ddd8499078569b2518edb1f1ba2749fa34cd184690b07"),
)
FILES = {row[1]: DemoFile(*row) for row in _PUBLISHED}
MMDIT_FILE, UNET_FILE, CONTROL_FILE = (FILES[f"{name}.safetensors"] for name in ("mmdit", "unet", "controlnet"))


def pair(name: str) -> tuple[DemoFile, DemoFile]:
    """TAESD's encoder and decoder; `name` as in taesd3."""
    return FILES[f"{name}{ENCODER}"], FILES[f"{name}{DECODER}"]


def say_first(file: DemoFile, done: int) -> None:
    """A line when a fetch begins."""
    if not done:
        print(f"Fetching {file.name}, {file.size / 2**20:.1f} MiB, from {file.url}", file=sys.stderr, flush=True)


def present(file: DemoFile, fetching: Fetching = say_first) -> Path:
    """The file, as it is shipped, or from the user's cache, where it is fetched to if it isn't there.

    Raises: CheckpointError: it could not be had, or is not what was published.
    """
    if file.shipped.is_file():
        return file.shipped
    kept = cache_folder() / file.name
    if not kept.is_file() or _sha256(kept) != file.sha256:
        _fetch(file, kept, fetching)
    return kept


def demo_of(path: Path) -> DemoFile | None:
    """Which of the demo's files lies there."""
    file = FILES.get(path.name)
    return file if file is not None and path in (file.shipped, cache_folder() / file.name) else None


def cache_folder() -> Path:
    """The user's own, as freedesktop.org has it: a relative $XDG_CACHE_HOME doesn't count."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "parallel-mmdit" / "demo"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _fetch(file: DemoFile, target: Path, fetching: Fetching) -> None:
    """Whole and checked, or not at all. Each process writes a file of its own, so that none sees another's half."""
    fetching(file, 0)
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f"{file.name}.", dir=target.parent, delete=False) as writing:
            part = Path(writing.name)
            for block in _blocks(file, fetching):
                writing.write(block)
        _check(file, part, target)
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise _error(file, target, f"{type(error).__name__}: {error}") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _blocks(file: DemoFile, fetching: Fetching) -> Iterator[bytes]:
    """What the release gives, and never more than a block beyond the file's size."""
    done = 0
    with urllib.request.urlopen(file.url, timeout=SILENT_SECONDS) as answer:
        while done <= file.size and (block := answer.read(_BLOCK)):
            yield block
            done += len(block)
            fetching(file, done)


def _check(file: DemoFile, part: Path, target: Path) -> None:
    size = part.stat().st_size
    if size != file.size:
        came = f"{size} of {file.size} bytes came" if size < file.size else f"more than its {file.size} bytes came"
        raise _error(file, target, came)
    if (found := _sha256(part)) != file.sha256:
        raise _error(file, target, f"its sha256 is {found}, not {file.sha256}")


def _error(file: DemoFile, target: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"The demo's {file.name} could not be fetched from {file.url}: {what}.",
        f"Try again, or put the file there by hand: {target}",
    )
