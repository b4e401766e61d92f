"""The file that a ControlNet comes from: core's loading function leaves no trace of it, so the pack has it leave one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import comfy.controlnet

_MARK = "parallel_mmdit_file"


class _Weights(dict[str, Any]):
    """A Control-LoRA's, which its copies share as those of other ControlNets share a network."""


def remember_files() -> None:
    """From now on, every ControlNet that core loads tells its file."""
    load = comfy.controlnet.load_controlnet

    @functools.wraps(load)
    def load_controlnet(ckpt_path: str, *args: Any, **kwargs: Any) -> Any:
        control = load(ckpt_path, *args, **kwargs)
        leave_file(control, Path(ckpt_path))
        return control

    comfy.controlnet.load_controlnet = load_controlnet


def leave_file(control: Any, path: Path) -> None:
    """The ControlNet and all its copies were loaded from `path`."""
    if isinstance(weights := getattr(control, "control_weights", None), dict):
        control.control_weights = _Weights(weights)
        setattr(control.control_weights, _MARK, path)
    elif getattr(control, "control_model", None) is not None:
        setattr(control.control_model, _MARK, path)


def file_of(control: Any) -> Path | None:
    """None where that isn't known."""
    for held in (getattr(control, name, None) for name in ("control_weights", "control_model")):
        if (path := getattr(held, _MARK, None)) is not None:
            return path
    return None
