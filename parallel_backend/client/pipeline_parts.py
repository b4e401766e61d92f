"""What a picture needs beside the diffusion model: text encoders, a VAE, the pipeline's settings. Found at once, loaded when needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoint_files.header import entries_of
from ..checkpoint_files.hub import local_path
from ..checkpoint_files.layout import model_folder
from ..checkpoint_files.vae_part import vae_prefix
from ..config import CELL
from ..errors import CheckpointError
from ..text_encoders.encoders import CheckpointEncoders
from ..text_encoders.files import EncoderFile, Kind, find, find_inside
from ..text_encoders.protocol import TextEncoders
from .families import Family, family_of
from .remote_vae import RemoteVAE

if TYPE_CHECKING:
    from .backend import Backend

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Of SD3 and SDXL, where no pipeline's folder says otherwise.
_SIZE = 1024


class PipelineParts:
    """Of the checkpoint at `path`; None for an argument looks into its file, or its pipeline's folder.

    Args:
        text_encoders: files and folders, or an object that encodes by itself.
        vae: as of `Backend.load_vae`, or one that is loaded.
        tokenizers: folders in which they are looked for first.
        name: what a remote backend calls the checkpoint.
    Raises: CheckpointError, UnsupportedError: a path holds something else.
    """

    def __init__(
        self,
        backend: Backend,
        path: Path,
        text_encoders: Paths | TextEncoders | None = None,
        vae: Paths | RemoteVAE | None = None,
        tokenizers: Paths = (),
        name: str = "",
    ) -> None:
        self.path, self._names = path, [name] if name else []
        self._backend, self._vae = backend, vae
        self._tokenizers = [*_paths(tokenizers), *([path] if path.is_dir() else [])]
        self._encoders: TextEncoders | None = None
        self._files: Mapping[Kind, EncoderFile] | None = None
        if isinstance(text_encoders, TextEncoders):
            self._encoders = text_encoders
        elif text_encoders is not None:
            self._files = find(_paths(text_encoders))

    def family(self, name: str) -> Family:
        """Of the model that the backend calls so, with its pipeline's scheduler. Raises: UnsupportedError: as `family_of`."""
        family = family_of(self.path, name)
        config = self._json("scheduler", "scheduler_config.json")
        return replace(family, scheduler=config) if config else family

    def encoders(self, family: Family) -> TextEncoders:
        """Raises: CheckpointError: one that the family needs is not there."""
        if self._encoders is None:
            files = find_inside(self.path) if self._files is None else self._files
            zeros = family.name == "SDXL" and self._json("model_index.json").get("force_zeros_for_empty_prompt", True)
            self._encoders = CheckpointEncoders(family.name, files, family.context_width, zeros, self._tokenizers)
        return self._encoders

    def vae(self) -> RemoteVAE:
        """Loaded now. Raises: CheckpointError: none was given, and the checkpoint has none; as `Backend.load_vae`."""
        if isinstance(self._vae, RemoteVAE):
            return self._vae
        inside = (self.path / "vae").is_dir() if self.path.is_dir() else vae_prefix(entries_of(self.path)) is not None
        if self._vae is None and not inside:
            raise CheckpointError(
                f"{self.path.name} brings no VAE, and none was given.",
                "Give load_model vae=FILE, or take latents: output_type='latent'.",
            )
        given = self._vae
        self._vae = (
            self._backend.load_vae(self.path, names=self._names) if given is None else self._backend.load_vae(given)
        )
        return self._vae

    @cached_property
    def default_size(self) -> int:
        """Pixels of a side."""
        size = None if self._encoders is None else self._encoders.default_size
        folder = model_folder(self.path)
        cells = self._json(folder.name, "config.json").get("sample_size") if folder != self.path else None
        return size or (CELL * cells if isinstance(cells, int) else _SIZE)

    def _json(self, *names: str) -> Mapping[str, Any]:
        """Of the pipeline's folder; empty where there is no such file."""
        file = self.path.joinpath(*names)
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise CheckpointError(f"{file} is no JSON object.", "Download it again.")
        return found


def _paths(given: Paths) -> list[Path]:
    several = [given] if isinstance(given, (str, os.PathLike)) else given
    return [local_path(Path(path)) for path in several]
