"""The file that a ControlNet comes from: core's loading function leaves no trace of it, so the pack has it leave one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.controlnet
import torch
from torch import Tensor

from ..parallel_backend.checkpoint_files.bitsandbytes_entries import FOUR_BITS
from ..parallel_backend.checkpoint_files.content import content_key
from ..parallel_backend.checkpoint_files.gguf_file import is_gguf
from ..parallel_backend.checkpoint_files.header import entries_of
from ..parallel_backend.checkpoint_files.packed_entries import FORMS, PackedEntry, has_packing, packed_entries
from ..parallel_backend.checkpoint_files.unet_control_files import is_control_lora, is_difference, is_unet_control
from ..parallel_backend.errors import CheckpointError, UnsupportedError
from .hung.refusal import as_sentence
from .hung.weights import PREFIX

_LOADER = "ComfyUI's Load ControlNet Model"

_MARK = "parallel_mmdit_file"


@dataclass(frozen=True)
class _Mark:
    """What is known of a ControlNet.

    Args:
        content: of the file when it was loaded; empty where that can't be told.
        in_ranks_alone: where the ranks can't compute it, it is to be refused.
        lost_scales: its file has scales beside its weights, which core's loader leaves out.
    """

    path: Path
    content: str
    in_ranks_alone: bool
    lost_scales: bool


class _Weights(dict[str, Any]):
    """A Control-LoRA's, which its copies share as those of other ControlNets share a network."""


def remember_files() -> None:
    """From now on, every ControlNet that core loads tells its file; one of differences is laid on a parallel MODEL's weights too."""
    load = comfy.controlnet.load_controlnet

    @functools.wraps(load)
    def load_controlnet(ckpt_path: str, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            control = load(ckpt_path, _with_weights(model), *args, **kwargs)
        except Exception as error:
            if (what := _unread_by_core(Path(ckpt_path))) is None:
                raise
            path, use = Path(ckpt_path), by_core(Path(ckpt_path))
            remedy = f"Load it with Load Parallel ControlNet, or {use}" if _is_for_ranks(path) else as_sentence(use)
            raise UnsupportedError(f"{path.name} is {what}, which ComfyUI reads no ControlNet from.", remedy) from error
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

    def __contains__(self, name: object) -> bool:
        """Without making the weight."""
        return isinstance(name, str) and name.startswith(PREFIX) and name.removeprefix(PREFIX) in self._weights

    def __iter__(self) -> Iterator[str]:
        return (PREFIX + name for name in self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class InRanksAlone(torch.nn.Module):
    """In the place of a network that ComfyUI doesn't load, since only the ranks are to compute it."""

    dtype = torch.float32

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            f"{self.path.name} comes from Load Parallel ControlNet, whose weights only the ranks read; here ComfyUI is to compute it: "
            "the MODEL is not parallel, or its sampler hands ControlNets on in a way of its own.",
            f"Put Parallelize Model before the sampler, or {by_core(self.path)}",
        )


def control_in_ranks(path: Path) -> Any:
    """The CONTROL_NET of a file that the ranks alone are to compute; its weights stay where they are, if its kind lets them.

    Raises: CheckpointError: the file can't be read, or holds no ControlNet.
    """
    if _is_for_ranks(path):
        network = InRanksAlone(path)
        # By the file's name, as core does: nothing in such a file tells it.
        pools = path.stem.endswith(("_shuffle", "_shuffle_fp16"))
        control = comfy.controlnet.ControlNet(network, global_average_pooling=pools, load_device=torch.device("cpu"))
    else:
        control = comfy.controlnet.load_controlnet(str(path))
    if control is None:
        raise CheckpointError(f"{path.name} holds no ControlNet.", "Choose a ControlNet's file.")
    leave_file(control, path, in_ranks_alone=True)
    return control


def _is_for_ranks(path: Path) -> bool:
    """Whether nothing of core's own loader is needed for it. Raises: CheckpointError: the file can't be read."""
    names = entries_of(path)
    return is_unet_control(names) and not (is_control_lora(names) or is_difference(names))


def leave_file(control: Any, path: Path, *, in_ranks_alone: bool = False) -> None:
    """The ControlNet and all its copies were loaded from `path`.

    Args:
        in_ranks_alone: where the ranks can't compute it, it is to be refused.
    """
    if isinstance(weights := getattr(control, "control_weights", None), dict):
        control.control_weights = _Weights(weights)
    mark = _Mark(path, _content(path), in_ranks_alone, _has_scales(path))
    for held in _shared_by_copies(control):
        setattr(held, _MARK, mark)


def file_of(control: Any) -> Path | None:
    """None where that isn't known."""
    mark = _mark(control)
    return None if mark is None else mark.path


def is_for_ranks_alone(control: Any) -> bool:
    mark = _mark(control)
    return mark is not None and mark.in_ranks_alone


def has_changed_since(control: Any) -> bool:
    """Whether its file holds something else than ComfyUI has loaded from it; one that the ranks alone compute is what its file is."""
    mark = _mark(control)
    if mark is None or mark.in_ranks_alone:
        return False
    return bool(mark.content and (now := _content(mark.path)) and now != mark.content)


def has_lost_scales(control: Any) -> bool:
    """Whether ComfyUI holds other weights than its file means: the ranks alone read those as they are meant."""
    mark = _mark(control)
    return mark is not None and mark.lost_scales


def by_core(path: Path | None) -> str:
    """What makes ComfyUI compute the ControlNet of that file itself, as the second half of a remedy."""
    if path is not None and _unread_by_core(path) is not None:
        return f"use its .safetensors file in half precision or fp8, with {_LOADER}."
    return f"load it with {_LOADER}."


def _unread_by_core(path: Path) -> str | None:
    """What kind of file it is, where core reads none of that kind."""
    if is_gguf(path):
        return "a GGUF file"
    try:
        forms = {entry.form for entry in _packed(path).values()}
    except (CheckpointError, UnsupportedError):
        return None
    several = sorted(form for form in forms if form in FOUR_BITS or FORMS[form].packed > 1)
    return f"quantised as {', '.join(several)}" if several else None


def _content(path: Path) -> str:
    try:
        return content_key(path, timed=False)
    except CheckpointError:
        return ""


def _has_scales(path: Path) -> bool:
    try:
        return any(len(entry.parts) > 1 for entry in _packed(path).values())
    except UnsupportedError:  # it is quantised in some other way, which core heeds as little
        return True
    except CheckpointError:
        return False


def _packed(path: Path) -> dict[str, PackedEntry]:
    return packed_entries(path)[1] if has_packing(path) else {}


def _mark(control: Any) -> _Mark | None:
    return next((mark for held in _shared_by_copies(control) if (mark := getattr(held, _MARK, None))), None)


def _shared_by_copies(control: Any) -> list[Any]:
    """A network, or a Control-LoRA's weights."""
    held = (getattr(control, name, None) for name in ("control_weights", "control_model", "t2i_model"))
    return [part for part in held if isinstance(part, (torch.nn.Module, _Weights))]
