"""ControlNets that the ranks compute: core's own objects, whose network is asked only for what it would be given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import comfy.controlnet
import torch
from comfy.controlnet import ControlBase, ControlNet
from torch import Tensor

from ...parallel_backend import ControlUse, RemoteControl
from ..controlnet_files import InRanksAlone, has_changed_since
from .layers import functions_of, is_own
from .makers import maker_of
from .refusal import module_of
from .weights import PREFIX

# Of core's classes those whose networks the ranks know, by where these come from.
_KINDS = tuple(
    found
    for name in ("ControlNet", "ControlNetSD35", "ControlLora")
    if (found := getattr(comfy.controlnet, name, None)) is not None
)
_NETWORKS = ("comfy.cldm.cldm", "comfy.cldm.mmdit", "comfy.cldm.dit_embedder")
# What the networks of Stability's ControlNets for SD3.5 take of the model's own layers.
_BORROWED = (f"{PREFIX}x_embedder.", f"{PREFIX}y_embedder.")


def unknown_to_ranks(control: ControlBase, *, is_patched: bool, of_hooks: Collection[str]) -> str:
    """Why only ComfyUI can compute it; empty where the ranks may.

    Args:
        is_patched: patches, or hooks that have some, lie on the weights of the parallel MODEL.
        of_hooks: the names of those weights that hooks patch, by turns.
    """
    if is_patched and type(control).__name__ == "ControlLora":
        return "it is made of the MODEL's weights, on which patches lie"
    if type(control) not in _KINDS:
        return f"{module_of(type(control))}.{type(control).__qualname__} is no ControlNet that the ranks know"
    if type(control).__name__ == "ControlNetSD35" and any(name.startswith(_BORROWED) for name in of_hooks):
        return "it borrows layers of the MODEL, which hooks patch"
    if has_changed_since(control):
        return "its file has changed since ComfyUI loaded it"
    network = getattr(control, "control_model", None)
    if network is not None and not isinstance(network, InRanksAlone) and type(network).__module__ not in _NETWORKS:
        return f"its network is {type(network).__module__}.{type(network).__qualname__}"
    if replaced := next(_replaced(control, network), None):
        return replaced
    wrapped = getattr(control, "control_model_wrapped", None)
    if any(getattr(wrapped, held, None) for held in ("patches", "object_patches", "hook_patches")):
        return "its own weights are patched"
    if control.global_average_pooling:
        return "it pools its residuals over the picture"
    kinds = getattr(comfy.controlnet, "StrengthType", None)
    if kinds is not None and control.strength_type != kinds.CONSTANT:
        return f"its strength is {control.strength_type.name}"
    return ""


def _replaced(control: ControlBase, network: torch.nn.Module | None) -> Iterator[str]:
    """What packs have put in the place of core's functions, of it and of its network, or hung on that one's layers."""
    layers = {} if network is None or isinstance(network, InRanksAlone) else dict(network.named_modules())
    named: list[tuple[object, str]] = [(control, type(control).__name__)]
    named += [(layer, name or "its network") for name, layer in layers.items()]
    for part, of in named[:2]:
        for name, function in functions_of(type(part)):
            if maker := maker_of(function):
                yield f"{maker} has replaced {name} of {of}"
    for part, of in named:
        for name, value in vars(part).items():
            if isinstance(getattr(type(part), name, None), FunctionType) and not is_own(part, name, value):
                yield f"{name} of {of} is replaced"
        if getattr(part, "_forward_hooks", None) or getattr(part, "_forward_pre_hooks", None):
            yield f"a hook is on {of}"


def is_of_another_family(control: ControlBase) -> bool:
    """Whether it is one of core's whose network goes with models that are neither SD3 nor SDXL."""
    network = type(getattr(control, "control_model", None)).__module__
    return type(control).__module__ == comfy.controlnet.__name__ and network.startswith("comfy.ldm.")


class _Asked(torch.nn.Module):
    """In the place of a ControlNet's network: keeps what core has made ready for it."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.hint, self.types = torch.empty(0), tuple[int, ...]()

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, **extra: Any) -> Mapping[str, Any]:
        self.hint, self.types = hint, tuple(extra.get("control_type", ()))
        return {"output": []}


class ShardedControl(ControlBase):
    """One ControlNet of a chain: when and with what it is added is core's doing, what it adds is the ranks'."""

    def __init__(self, control: ControlBase, net: RemoteControl) -> None:
        super().__init__()
        self._asked, self._net = _Asked(), net
        self._probe = ControlNet(None)
        control.copy_to(self._probe)
        self._probe.control_model = self._asked

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        self._probe.pre_run(model, percent_to_timestep_function)

    @property
    def hints(self) -> int:
        """Pictures that it was given."""
        return len(self._probe.cond_hint_original)

    def use(self, *args: Any) -> ControlUse | None:
        """At the evaluation that core asks for; None outside the range."""
        if self._probe.get_control(*args) is None:
            return None
        return ControlUse(self._net, self._asked.hint, self._probe.strength, types=self._asked.types)

    def use_of_loop(self, latent: Tensor, sigma: Tensor, inputs: Mapping[str, Tensor]) -> ControlUse:
        """For all evaluations of latents like this one, with the range in which it is added."""
        start, end = self._probe.timestep_range
        with self._always():
            self._probe.get_control(torch.zeros_like(latent), sigma.expand(latent.shape[0]), inputs, 1, {})
        hint, types = self._asked.hint, self._asked.types
        return ControlUse(self._net, hint, self._probe.strength, float(start), float(end), types)

    def get_extra_hooks(self) -> list[Any]:
        return self._probe.get_extra_hooks()

    def get_models(self) -> list[Any]:
        return []

    def cleanup(self) -> None:
        self._probe.cleanup()

    @contextmanager
    def _always(self) -> Iterator[None]:
        kept, self._probe.timestep_range = self._probe.timestep_range, None
        try:
            yield
        finally:
            self._probe.timestep_range = kept
