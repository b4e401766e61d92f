"""Every SD3 / SDXL MODEL parallel, in unchanged workflows: what core's loading functions give while that is on."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths

from ..parallel_backend.errors import CheckpointError, ConfigError, UnsupportedError
from .family import kind_of_file
from .load_models import parallel_model
from .loader_file import leave, left
from .mesh_config import default_mesh
from .node_text import own_text, say
from .remote_model import RemotePatcher

# The setting in the editor (web/everywhere.js has the same), and the variable for servers that nobody sits at.
SETTING, VARIABLE = "ParallelMMDiT.Everywhere", "PARALLEL_MMDIT_EVERYWHERE"
# Told one of these, a loader is asked for a MODEL of ComfyUI's own.
_OWN = frozenset({"load_device", "offload_device", "custom_operations"})
Load = Callable[..., Any]


class Everywhere:
    """Whether it is on, who said so, and which files became parallel or stayed local since, and why.

    `install` puts it around core's loading functions; while it is off they do what they always did. What a pack keeps of its own
    accord (a loader with its own cache) stays what it was until it is loaded again.
    """

    def __init__(self) -> None:
        self._on: bool | None = None
        self._said_by = ""
        self._parallel: set[str] = set()
        self._local: dict[str, str] = {}

    @property
    def on(self) -> bool:
        """What was said last; at first the environment variable, else the user's stored setting, else off."""
        if self._on is None:
            told = os.environ.get(VARIABLE, "")
            if told not in ("", "0", "1"):
                raise ConfigError(f"{VARIABLE}={told!r} means nothing.", "Set it to 1 or 0, or not at all.")
            if told:
                self.switch(told == "1", "environment")
            else:
                self.switch(_stored(), "setting")
        return bool(self._on)

    def switch(self, on: bool, said_by: str) -> bool:
        """It is `on` now; MODELs that were loaded before stay what they are. Returns: whether that is a change."""
        before = bool(self._on)
        self._on, self._said_by = on, said_by
        if on != before:
            self._parallel, self._local = set(), {}
            now = "are made parallel" if on else "are loaded by ComfyUI"
            logging.info("parallel-mmdit: SD3 / SDXL models of all loaders %s from now on (%s)", now, said_by)
        return on != before

    def told(self) -> dict[str, Any]:
        """For the status route."""
        return {
            "on": self.on,
            "said_by": self._said_by,
            "parallel": sorted(self._parallel),
            "local": self._local,
        }

    def install(self) -> None:
        """Once, when ComfyUI loads the pack. What core has for old packs, load_checkpoint and load_unet, calls these two."""
        for name, parallel_load in (
            ("load_checkpoint_guess_config", self._checkpoint),
            ("load_diffusion_model", self._diffusion_model),
        ):
            load = getattr(comfy.sd, name)
            if "model_options" in inspect.signature(load).parameters:
                setattr(comfy.sd, name, self._around(load, parallel_load))
            else:
                logging.warning("parallel-mmdit: another pack has replaced comfy.sd.%s; its MODELs stay local", name)

    def _around(self, load: Load, parallel_load: Callable[[Load, inspect.BoundArguments], Any]) -> Load:
        """As `load`, or as `parallel_load` does it where that gives something."""
        signature = inspect.signature(load)

        @functools.wraps(load)
        def around(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            out = parallel_load(load, call) if self._is_meant(call.arguments) else None
            if out is None:
                out = load(*args, **kwargs)
                _remember(out, around, call.args)
            return out

        return around

    def _is_meant(self, given: dict[str, Any]) -> bool:
        """Core's own calls, and those for a MODEL in some other place or form, are left alone."""
        if not self.on or given.get("disable_dynamic") or not given.get("output_model", True):
            return False
        return not _OWN.intersection(given.get("model_options") or ())

    def _checkpoint(self, load: Load, call: inspect.BoundArguments) -> tuple[Any, ...] | None:
        model = self._model(call.arguments["ckpt_path"], call.arguments["model_options"])
        if model is None:
            return None
        call.arguments["output_model"] = False  # CLIP and VAE alone: the diffusion weights are not read
        return (model, *load(*call.args, **call.kwargs)[1:])

    def _diffusion_model(self, load: Load, call: inspect.BoundArguments) -> RemotePatcher | None:
        return self._model(call.arguments["unet_path"], call.arguments["model_options"])

    @own_text()
    def _model(self, file: str, options: dict[str, Any]) -> RemotePatcher | None:
        """The file's MODEL on Mesh Config's defaults; None where it is of another family, or of a form that ranks don't know."""
        path = Path(file)
        try:
            kind = kind_of_file(path)
            if kind is None:
                return None
            patcher, report = parallel_model(default_mesh(), kind, path, options=options)
        except (CheckpointError, UnsupportedError) as error:
            self._local[path.name] = error.brief
            say(f"{path.name} stays local: {error.brief}", log=True)
            return None
        self._parallel.add(path.name)
        say(report, log=True)
        return patcher


def _remember(out: Any, load: Load, args: Sequence[Any]) -> None:
    """Leaves the file on what an older core gave; newer ones do that themselves."""
    model, _, vae, *_ = out if isinstance(out, tuple) else (out, None, None)
    for patcher in (model, getattr(vae, "patcher", None)):
        if patcher is not None and left(patcher) is None:
            leave(patcher, load, args)


def _stored() -> bool:
    """The setting as the editor stored it for the default user."""
    file = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get(SETTING) is True
