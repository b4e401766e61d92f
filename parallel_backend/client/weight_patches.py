"""Patches on a model's weights as a client holds them, and their files in the runtime folder."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..checkpoint_files.patch_file import LowRank, Whole, is_patch_file, write_low_rank, write_whole, writer_of
from ..rpc.messages import Patches
from ..rpc.runtime_dir import is_alive, patches_folder

# Of one process: sets that take turns find theirs again, and a set of whole models' weights takes gigabytes.
KEPT_FILES = 4
PART_BYTES = 2**26


class WeightPatches:
    """A set of patches, by the weights' names in a single-file checkpoint. Immutable; written when first needed.

    Args:
        low_rank: with the factor that each one's product counts.
        whole: of weights that no low-rank patch is for.
    """

    def __init__(self, low_rank: Sequence[tuple[LowRank, float]] = (), whole: Sequence[Whole] = ()) -> None:
        self._low_rank, self._whole = list(low_rank), list(whole)
        self._written: Patches | None = None

    def __bool__(self) -> bool:
        return bool(self._low_rank or self._whole)

    def __deepcopy__(self, memo: object) -> WeightPatches:
        return self

    @property
    def is_written(self) -> bool:
        """Whether its files are there."""
        folder = patches_folder()
        return self._written is not None and all((folder / name).is_file() for name in self._written.files)

    def named(self) -> Patches:
        """How a request names them; their files are there now.

        Raises: CheckpointError: they can't be written.
        """
        folder = patches_folder()
        if not self.is_written:
            low_rank = write_low_rank(folder, [patch for patch, _ in self._low_rank]) if self._low_rank else ""
            whole = write_whole(folder, self._whole) if self._whole else ""
            self._written = Patches(low_rank, [factor for _, factor in self._low_rank], whole)
            _remove_old(folder, keep=self._written.files)
        assert self._written is not None
        for name in self._written.files:
            os.utime(folder / name)
        return self._written


def parts_of(name: str) -> Iterator[tuple[bytearray, bool]]:
    """The bytes of a patch file in parts, and whether a part is the last."""
    path = patches_folder() / name
    left = path.stat().st_size
    with path.open("rb") as file:
        while left:
            part = bytearray(file.read(PART_BYTES))
            left -= len(part)
            yield part, not left


def _remove_old(folder: Path, keep: Sequence[str]) -> None:
    """What processes that have ended left, also half written; and the oldest files of this one."""
    own = [path for path in _written_here(folder) if path.name not in keep]
    with suppress(FileNotFoundError):
        own.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    left = [path for path in folder.iterdir() if (pid := writer_of(path.name)) is not None and not is_alive(pid)]
    for path in own[max(0, KEPT_FILES - len(keep)) :] + left:
        path.unlink(missing_ok=True)


def _written_here(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_patch_file(path.name) and writer_of(path.name) == os.getpid()]


@atexit.register
def _remove_own() -> None:
    with suppress(OSError):
        for path in _written_here(patches_folder()):
            path.unlink()
