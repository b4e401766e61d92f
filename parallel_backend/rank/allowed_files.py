"""Which files a backend opens for those who ask it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ..checkpoint_files.content import content_key
from ..checkpoint_files.layout import files_of
from ..errors import CheckpointError


@dataclass(frozen=True)
class AllowedFiles:
    """Files below these folders; any file where none is named, since whoever may ask is the same user then."""

    folders: tuple[Path, ...] = ()

    def checked(self, name: str, key: str) -> Path:
        """The file of that name, absolute or below one of the folders, which is the one that was meant.

        Raises: CheckpointError: it isn't there, may not be opened, or isn't what it was.
        """
        return self.all_checked([name], key)[0]

    def all_checked(self, names: Sequence[str], key: str) -> list[Path]:
        """As `checked`, of files whose joined keys are `key`."""
        for paths in product(*map(self._found, names)):
            if key in ("-".join(content_key(path, timed=timed) for path in paths) for timed in (True, False)):
                return list(paths)
        raise CheckpointError(
            f"{Path(names[0]).name} is not the file (any more) that was asked for: its content has changed.",
            "Run the loader again (in ComfyUI: queue the prompt again); on several hosts, copy the same file to each.",
        )

    def _found(self, name: str) -> list[Path]:
        """The files of that name, in the folders' order; a link by its own name, which says what it leads to.

        What a link leads to must lie below one of the folders too: a hub's cache is named beside them, or holds its links itself.
        """
        candidates = [Path(os.path.abspath(root / name)) for root in self.folders or (Path(),)]
        inside = [path for path in candidates if self._is_inside(path)]
        if not inside:
            raise CheckpointError(
                f"{name!r} is outside this backend's model folders.",
                f"Put the file below one of them: {', '.join(map(str, self.folders))}; or name it with serve --models.",
            )
        found = [path for path in inside if path.exists()]
        if not found:
            raise CheckpointError(f"{inside[0]} is not there (any more).", "Put it back, or load another.")
        for file in (file for path in found for file in files_of(path)):
            if not self._is_inside(file):
                raise CheckpointError(
                    f"{file} leads outside this backend's model folders.", "Name those of the files too."
                )
        return found

    def _is_inside(self, path: Path) -> bool:
        roots = [folder.resolve() for folder in self.folders]
        return not roots or any(path.resolve().is_relative_to(root) for root in roots)
