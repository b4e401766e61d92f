"""ControlNets on a parallel MODEL: what core's sampling hands a model as `control`, and the objects that make it.

A ControlNet hangs on the prompts, not on the MODEL. Of those in ComfyUI's process the residuals go to the ranks with each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.controlnet
import comfy.model_management as mm
import torch
from comfy.controlnet import ControlBase
from torch import Tensor

from ...parallel_backend.errors import BackendError, CheckpointError, ConfigError, OutOfMemoryError, UnsupportedError
from ..controlnet_files import by_core, file_of, has_lost_scales, is_for_ranks_alone
from .guidance import functions_on_controls, patches_blocks
from .refusal import LOCALLY, as_sentence, is_set, module_of, refuse
from .sharded_control import ShardedControl, is_of_another_family, unknown_to_ranks

Control = Mapping[str, Sequence[Tensor | None]]
REMOVE = f"Remove that ControlNet, or {LOCALLY}."
SIDES = ("input", "middle", "output")
# Beside those, in what a chain gives: the ControlNets that the ranks compute at this evaluation.
USES = "in the ranks"
# What a network of core's raises that is given what is another model's.
_MISFITS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)
# These read weights of the model that they are used with.
_READERS = tuple(
    found for name in ("ControlLora", "ControlNetSD35") if (found := getattr(comfy.controlnet, name, None)) is not None
)


@dataclass
class ControlCost:
    """What the residuals of a sampling came to, between ComfyUI and the ranks."""

    evaluations: int = 0
    nbytes: int = 0

    def note(self, control: Control, itemsize: int) -> None:
        """A tensor that stands in several places counts once, as it travels once."""
        tensors = {id(tensor): tensor for side in control.values() for tensor in side if tensor is not None}
        self.evaluations += bool(tensors)
        self.nbytes += sum(tensor.numel() * itemsize for tensor in tensors.values())

    def __str__(self) -> str:
        if not self.evaluations:
            return ""
        mib = self.nbytes / self.evaluations / 2**20
        return f"ControlNet computed in ComfyUI's process; {mib:.1f} MiB of residuals an evaluation go to the ranks"


def by_place(control: Mapping[str, Any], network: torch.nn.Module) -> Control:
    """Residuals in the order of the network's blocks, as a backend takes them.

    Core's UNets take them from the end of each list, its transformers from the start; what is left over is not used.
    Raises: UnsupportedError: of another form than core's.
    """
    if extra := sorted(key for key, value in control.items() if key not in (*SIDES, USES) and is_set(value)):
        raise UnsupportedError(
            f"A parallel MODEL can't honour a ControlNet's {', '.join(map(repr, extra))}.",
            REMOVE,
        )
    given = {side: list(control.get(side) or ()) for side in SIDES}
    blocks = getattr(network, "input_blocks", None)
    if blocks is None:
        return {"output": given["output"]}
    missing = len(blocks) - len(given["output"])
    output = given["output"][-len(blocks) :] if missing <= 0 else [None] * missing + given["output"]
    return {"input": given["input"][::-1][: len(blocks)], "middle": given["middle"][-1:], "output": output}


def chain_of(control: ControlBase) -> list[ControlBase]:
    """A prompt's ControlNets, the first that was applied first."""
    found: list[ControlBase] = []
    while control is not None:
        found.insert(0, control)
        control = control.previous_controlnet
    return found


class ControlChain(ControlBase):
    """A prompt's ControlNets, in the place of the last one, whose part they play for core's sampling.

    Args:
        members: core's objects, or those that the ranks compute.
        weights: of the parallel MODEL, by name, for those that read them.
        refusals: what the ranks said of the files of those that they don't take.
    """

    def __init__(
        self,
        members: Sequence[ControlBase | ShardedControl],
        weights: Callable[[], Mapping[str, Tensor]],
        refusals: Sequence[BackendError],
    ) -> None:
        super().__init__()
        self.members, self._weights, self._refusals = list(members), weights, refusals

    @property
    def is_needed(self) -> bool:
        """Whether core's own chain would not do."""
        return bool(self._refusals) or any(isinstance(member, (ShardedControl, *_READERS)) for member in self.members)

    @property
    def in_ranks(self) -> list[ShardedControl] | None:
        """Its members where the ranks compute all of them, else None."""
        sharded = [member for member in self.members if isinstance(member, ShardedControl)]
        return sharded if len(sharded) == len(self.members) else None

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        seen = _WithWeights(model, self._weights)
        with self._answering() as members, self._explained():
            for member in members:
                member.pre_run(seen, percent_to_timestep_function)

    def get_control(self, *args: Any, **kwargs: Any) -> Control | None:
        added: Control | None = None
        uses = []
        with self._answering() as members, self._explained():
            for member in members:
                if isinstance(member, ShardedControl):
                    uses.append(member.use(*args))
                else:
                    added = member.get_control(*args, **kwargs)
        if used := [use for use in uses if use is not None]:
            return {**(added or {}), USES: used}
        return added

    def get_models(self) -> list[Any]:
        with self._answering() as members:
            return [model for member in members for model in member.get_models()]

    def get_extra_hooks(self) -> list[Any]:
        with self._answering() as members:
            return [hooks for member in members for hooks in member.get_extra_hooks()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        with self._answering() as members:
            return sum(member.inference_memory_requirements(dtype) for member in members)

    def cleanup(self) -> None:
        with self._answering() as members:
            for member in members:
                member.cleanup()

    @contextmanager
    def _answering(self) -> Iterator[list[ControlBase]]:
        """Each that the ranks compute; and of the others the last, which answers for those before it: core adds them up."""
        local = [member for member in self.members if not isinstance(member, ShardedControl)]
        before = [member.previous_controlnet for member in local]
        for member, previous in zip(local, [None, *local], strict=False):
            member.previous_controlnet = previous
        try:
            yield [member for member in self.members if isinstance(member, ShardedControl) or member is local[-1]]
        finally:
            for member, previous in zip(local, before, strict=True):
                member.previous_controlnet = previous

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where core's network stumbles over a MODEL of another family, the ranks have said already what is wrong."""
        try:
            yield
        except _MISFITS as error:
            if not self._refusals or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            refusal, what = self._refusals[0], f"{type(error).__name__}: {str(error)[:200]}"
            raise UnsupportedError(
                f"{refusal.message} ComfyUI can't compute it for this MODEL either ({what}).", refusal.remedy
            ) from error


def take_over(conds: Mapping[str, list[dict[str, Any]]], model: Any) -> list[str]:
    """Chains in the place of those ControlNets that the parallel MODEL has to do something for; one for all prompts that share it.

    Args:
        model: the RemotePatcher.
    Returns: which ControlNets ComfyUI computes, and why.
    Raises: UnsupportedError: of a ControlNet that works by patches of the model's blocks, from whatever step on.
    """
    refuse(_in_blocks(conds), "A parallel MODEL", REMOVE)
    chains: dict[tuple[int, bool], ControlChain] = {}
    local: dict[str, None] = {}
    looking = next(functions_on_controls(model), "")
    for entry in (entry for entries in conds.values() for entry in entries):
        control = entry.get("control")
        if not isinstance(control, ControlBase) or isinstance(control, ControlChain):
            continue
        has_prompt = entry.get("cross_attn_controlnet") is not None
        if (key := (id(control), has_prompt)) not in chains:
            chains[key], reasons = _chain(control, model, has_prompt=has_prompt, looking=looking)
            local |= dict.fromkeys(reasons)
        if chains[key].is_needed and not looking:
            entry["control"] = chains[key]
    return list(local)


def _in_blocks(conds: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Of packs' own ControlNets those that leave patches of blocks where others give residuals, each by its name."""
    found = (entry.get("control") for entries in conds.values() for entry in entries)
    last = [control for control in found if isinstance(control, ControlBase) and not isinstance(control, ControlChain)]
    kinds = {type(member): member for control in last for member in chain_of(control)}
    for kind, member in kinds.items():
        if module_of(kind) != comfy.controlnet.__name__ and patches_blocks(member.get_control):
            yield f"the ControlNet {kind.__qualname__} of {module_of(kind)}, which patches blocks of the model"


def _chain(control: ControlBase, model: Any, *, has_prompt: bool, looking: str) -> tuple[ControlChain, list[str]]:
    """A prompt's ControlNets, those that the ranks can compute as such; and why others can't be.

    Args:
        has_prompt: they have a prompt of their own, beside the model's.
        looking: what looks at core's own objects while it samples, if anything.
    Raises: UnsupportedError: ComfyUI can't compute one of those others as it is meant, or isn't to.
    """
    members, reasons, refusals = [], [], list[BackendError]()
    is_patched = bool(model.patches or model.hook_patches)
    of_hooks = {key for patches in model.hook_patches.values() for key in patches}
    for member in chain_of(control):
        name = _named(member)
        refusal: BackendError | None = None
        if of_hooks and type(member).__name__ == "ControlLora":
            what = f"{name} is made of the MODEL's weights, which hooks on prompts patch."
            raise UnsupportedError(what, "Use a whole ControlNet, or lay the LoRA on the MODEL.")
        why = unknown_to_ranks(member, is_patched=is_patched, of_hooks=of_hooks)
        if has_prompt:
            why = "it has a prompt of its own"
        if looking:
            why = f"{looking} looks at its picture"
        if not why and (path := file_of(member)) is None:
            why = "its file is not known: another loader than core's has loaded it"
        if not why:
            try:
                member = ShardedControl(member, model.control_net(path))
            except (UnsupportedError, CheckpointError, ConfigError, OutOfMemoryError) as error:
                why = error.message
                if isinstance(error, (UnsupportedError, CheckpointError)):
                    refusal = error
        if is_of_another_family(member):
            what = f"{name} is a ControlNet of another family: {why}."
            refusal = UnsupportedError(what, "Choose a ControlNet of the MODEL's family.")
        if why:
            if looking and isinstance(member, _READERS):
                what = f"{name} takes weights of the MODEL, and {looking} looks at ControlNets by itself."
                raise UnsupportedError(what, f"Remove one of them, or {LOCALLY}.")
            _check_left_to_core(member, f"The ranks can't compute {name}: {why.rstrip('.')}.", refusal)
            reasons.append(f"{name}: {why}")
        if refusal is not None:
            refusals.append(refusal)
        members.append(member)
    return ControlChain(members, model.patched_weights, refusals), reasons


def _check_left_to_core(control: ControlBase, why: str, refusal: BackendError | None) -> None:
    """Raises: UnsupportedError: ComfyUI may not compute what the ranks don't, or not as it is meant.

    Args:
        refusal: what the ranks said of its file, if that is the reason.
    """
    if has_lost_scales(control):
        words = "ComfyUI can't either: it leaves the scales of its weights out."
        raise UnsupportedError(f"{why} {words}", "Use its file in half precision, or in fp8 without scales.")
    if is_for_ranks_alone(control):
        remedy = by_core(file_of(control))
        raise UnsupportedError(why, f"{refusal.remedy} Or {remedy}" if refusal is not None else as_sentence(remedy))


def _named(control: ControlBase) -> str:
    path = file_of(control)
    return type(control).__name__ if path is None else path.name


class _WithWeights:
    """A model of core's as a ControlNet looks at it before a sampling: all its own, but for the weights."""

    def __init__(self, model: Any, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._model = model
        self.diffusion_model = _LayersWithWeights(model.diffusion_model, "", weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _LayersWithWeights:
    """A network or one of its layers, whose weights are asked for."""

    def __init__(self, layer: torch.nn.Module, prefix: str, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._layer, self._prefix, self._weights = layer, prefix, weights

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._layer, name)
        if isinstance(found, torch.nn.Module):
            return _LayersWithWeights(found, f"{self._prefix}{name}.", self._weights)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """On the device where ComfyUI computes, as a loaded model's are."""
        weights, device = self._weights(), mm.get_torch_device()
        return {name: weights[self._prefix + name].to(device) for name in self._layer.state_dict()}
