"""The file that a ControlNet comes from: core's loading function leaves no trace of it, so the pack has it leave one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import comfy.controlnet
import torch
from torch import Tensor

from .hung.weights import PREFIX

_MARK = "parallel_mmdit_file"


class _Weights(dict[str, Any]):
    """A Control-LoRA's, which its copies share as those of other ControlNets share a network."""


def remember_files() -> None:
    """From now on, every ControlNet that core loads tells its file; one of differences is laid on a parallel MODEL's weights too."""
    load = comfy.controlnet.load_controlnet

    @functools.wraps(load)
    def load_controlnet(ckpt_path: str, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        control = load(ckpt_path, _with_weights(model), *args, **kwargs)
        leave_file(control, Path(ckpt_path))
        return control

    comfy.controlnet.load_controlnet = load_controlnet


def _with_weights(model: Any) -> Any:
    """A MODEL whose `model_state_dict` has weights: a parallel one's are asked for."""
    if not hasattr(model, "patched_weights"):
        return model
    asked = model.clone()
    asked.model_state_dict = lambda: _OfModel(model.patched_weights())
    return asked


class _OfModel(Mapping[str, Tensor]):
    """A network's weights by their names in core's model."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name.removeprefix(PREFIX)]

    def __iter__(self) -> Iterator[str]:
        return (PREFIX + name for name in self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def leave_file(control: Any, path: Path, *, in_ranks_alone: bool = False) -> None:
    """The ControlNet and all its copies were loaded from `path`.

    Args:
        in_ranks_alone: where the ranks can't compute it, it is to be refused.
    """
    if isinstance(weights := getattr(control, "control_weights", None), dict):
        control.control_weights = _Weights(weights)
    for held in _shared_by_copies(control):
        setattr(held, _MARK, (path, in_ranks_alone))


def file_of(control: Any) -> Path | None:
    """None where that isn't known."""
    path, _ = _mark(control)
    return path


def is_for_ranks_alone(control: Any) -> bool:
    _, in_ranks_alone = _mark(control)
    return in_ranks_alone


def _mark(control: Any) -> tuple[Path | None, bool]:
    return next((mark for held in _shared_by_copies(control) if (mark := getattr(held, _MARK, None))), (None, False))


def _shared_by_copies(control: Any) -> list[Any]:
    """A network, or a Control-LoRA's weights."""
    held = (getattr(control, name, None) for name in ("control_weights", "control_model", "t2i_model"))
    return [part for part in held if isinstance(part, (torch.nn.Module, _Weights))]
