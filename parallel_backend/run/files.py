"""Where a picture goes: never over one that is there, with what it was drawn from in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import InputError

SUFFIX = ".png"


def target(output: str, stem: str) -> Path:
    """The first file to try: `output` itself where it ends in .png, else `stem` in that folder, which is made.

    Raises: InputError: a file of another kind, or a folder that can't be made.
    """
    path = Path(output).expanduser()
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        folder = path.parent
    elif path.suffix and not path.is_dir():
        raise InputError(
            f"{output} is no folder and no {SUFFIX} file.", f"Name a folder, or a file that ends in {SUFFIX}."
        )
    else:
        folder, path = path, path / f"{stem}{SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} can't be made: {error}.", "Name another --output.") from None
    return path


def save(picture: Image.Image, path: Path, texts: Mapping[str, str]) -> Path:
    """Writes the picture, with these texts in it, to `path`, or to the next free one: picture.png, picture-2.png, and so on."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    free, file = _opened(path)
    with file:
        picture.save(file, "PNG", pnginfo=info)
    return free


def _opened(path: Path) -> tuple[Path, BinaryIO]:
    """A new file, made in one step with the question whether it is free. Raises: InputError: none can be written there."""
    for candidate in _numbered(path):
        try:
            return candidate, candidate.open("xb")
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{candidate} can't be written: {error}.", "Name another --output.") from None
    raise AssertionError("numbers don't end")


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_stem(f"{path.stem}-{number}")
