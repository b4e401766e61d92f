"""ComfyUI's own network without weights: its layers on the meta device, and a request where it would compute."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, ref

import comfy.patcher_extension
import torch
from comfy.model_base import BaseModel
from torch import Tensor

from ..parallel_backend import RemoteModel, WeightPatches
from ..parallel_backend.rpc.host_copies import onto_device
from .core_memory import WeightsElsewhere, interruptible
from .hung.controlnet import USES, ControlCost, by_place
from .hung.extra_cost import ExtraCost
from .hung.guidance import names
from .hung.kinds import extras_of, give_reports, is_known_change, unknown_patches
from .hung.later_evaluations import later_evaluations
from .hung.layers import AsMade, is_own
from .hung.nag_guider import repeated_prompt
from .hung.patcher import check_patcher
from .hung.patches import Call, Hung
from .hung.prompt_projection import PROJECTIONS, of_prompt, refuse_layer
from .hung.refusal import ELSEWHERE, RELOAD, refuse
from .node_text import say

# Core hands a ControlNet's own prompt to the network as well, which takes no notice of it.
_OF_CONTROLNETS = "crossattn_controlnet"


class Owner:
    """The model that has a network. Weakly: ComfyUI takes a model that outlives its MODELs for a leak. Copied with it, that of the copy."""

    def __init__(self, model: BaseModel) -> None:
        self.model = ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        model = self.model()
        return self if model is None else Owner(memo.get(id(model), model))


class RemoteNetwork(torch.nn.Module):
    """What a network of ComfyUI's becomes: an evaluation of it is a request, and its layers compute nothing."""

    remote: RemoteModel
    dtype: torch.dtype
    as_made: AsMade
    worn: WeightPatches
    told: dict[str, str]
    control_cost: ControlCost
    extra_cost: ExtraCost
    # What patches have become, as long as these are there; by the first of them, of each kind for itself.
    translated: WeakKeyDictionary[Any, Any]
    # What kinds remember in a sampling, by the names under which the ranks keep theirs.
    of_sampling: dict[str, Any]
    # What guidance functions of the sampling will hang, and no evaluation has been tried with yet.
    untried: list[Hung]
    owner: Owner
    calls_wrappers: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = vars(self).get("forward")
        if forward is not None and not is_own(
            self, "forward", forward
        ):  # put there while sampling: it would compute with layers that have no weights
            refuse(self.as_made.changes(), "A parallel MODEL", RELOAD)
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        refuse(_unsendable(kwargs), "A parallel MODEL", ELSEWHERE)
        around = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        wrappers = comfy.patcher_extension.get_all_wrappers(around, options) if self.calls_wrappers else []
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._remote_forward, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options)

    def _remote_forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, control: Any, options: dict[str, Any], **_: Any
    ) -> Tensor:
        self._check_patcher()
        # Checked here too: some guiders and wrappers add their patches while they sample.
        refuse(unknown_patches(options), "A parallel MODEL", ELSEWHERE)
        refuse(self.as_made.changes_since(), "A parallel MODEL", RELOAD)
        residuals = by_place(control or {}, self)
        self.control_cost.note(residuals, self.dtype.itemsize)
        given = {"patches": self.worn, "step": partial(step_of, options)}
        given |= {"residuals": residuals, "controls": (control or {}).get(USES, ())}
        given |= self._extras(x, context, options)
        context = self._prompt(context, given)
        out = interruptible(self.remote.backend, self.remote.forward, x, timesteps, context, y, **given)
        self._tell_once()
        return onto_device(out, x.device).to(x.dtype)

    def _check_patcher(self) -> None:
        """Packs sample with a patcher of core's that they make around the model: what hangs on that one, nobody has looked at yet.

        Raises: UnsupportedError: evaluations don't bring it.
        """
        patcher = getattr(self.owner.model(), "current_patcher", None)
        if patcher is None or isinstance(patcher, WeightsElsewhere):
            return
        self.as_made.forget_comparison()
        lying = ["patches of weights on a MODEL that a pack has made of this one"] if patcher.patches else []
        check_patcher(patcher, lying)

    def _extras(self, x: Tensor, context: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """What `forward` is told of the patches in these options."""
        branches, sigmas = tuple(options.get("cond_or_uncond", (0,))), options.get("sigmas")
        sigma = None if sigmas is None else float(sigmas[0])
        tokens, device = context.shape[1], x.device
        call = Call(self, tuple(x.shape), branches, sigma, options, tokens=tokens, device=device)
        extras, given = extras_of(call), {"later": later_evaluations(self.untried, call)}
        self.untried = []
        self.extra_cost.note(extras)
        if not extras:
            return given
        return given | {
            "extras": extras,
            "branches": branches,
            "sigma": sigma,
            "on_reports": lambda reports: give_reports(call, extras, reports, x),
        }

    def _prompt(self, context: Tensor, given: dict[str, Any]) -> Tensor:
        """The tokens of every row's prompt, as what hangs inside wants them. Raises: UnsupportedError: so ControlNets can't have them."""
        as_long = repeated_prompt(context, given.get("extras", ()))
        if as_long is not context and given["controls"]:
            beside = "a ControlNet in the ranks beside a negative prompt of ComfyUI-NAG that is longer than the prompt"
            refuse(iter([beside]), "A parallel MODEL", ELSEWHERE)
        return as_long

    def _tell_once(self) -> None:
        """What an evaluation was the first of the sampling to tell stands on the node, below what was told before."""
        notes = self.remote.last.notes if self.remote.last is not None else []
        news = {note: note for note in [self.remote.changed, *notes] if note}
        if self.remote.not_finite:  # as that of every evaluation after the first is, each with a step of its own
            news["not finite"] = self.remote.not_finite
        if news.keys() - self.told.keys():
            self.told |= {key: text for key, text in news.items() if key not in self.told}
            say("\n".join(self.told.values()), log=True)

    def _apply(self, fn: Any, recurse: bool = True) -> RemoteNetwork:
        """Unchanged: ComfyUI moves its models between devices, and what has no values can't be moved."""
        return self


def step_of(options: dict[str, Any]) -> tuple[int, int]:
    """Which step, from 1, of how many ComfyUI's own loop is at; (0, 0) outside of one."""
    all_sigmas, sigmas = options.get("sample_sigmas"), options.get("sigmas")
    if all_sigmas is None or sigmas is None or len(all_sigmas) < 2:
        return 0, 0
    # Samplers of several evaluations a step have some between two of the schedule's sigmas.
    passed = int((all_sigmas >= sigmas.max().to(all_sigmas) * (1 - 1e-6)).sum())
    return min(max(passed, 1), len(all_sigmas) - 1), len(all_sigmas) - 1


def _unsendable(kwargs: dict[str, Any]) -> Iterator[str]:
    given = (name for name, value in kwargs.items() if value is not None and name != _OF_CONTROLNETS)
    yield from (f"the model argument {name!r}" for name in given)


def make_remote(model: BaseModel, remote: RemoteModel, dtype: torch.dtype) -> None:
    """Evaluations of the model's network are requests from now on; it stays an instance of its own class, with all that this one has."""
    network: Any = model.diffusion_model
    network.to("meta").requires_grad_(False)
    for name, layer in network.named_modules():
        if name.endswith(PROJECTIONS):
            layer.forward = partial(of_prompt, name)  # type: ignore[method-assign]
        elif layer is not network:
            layer.register_forward_pre_hook(partial(refuse_layer, name))
    network.calls_wrappers = _calls_wrappers(type(network))
    network.__class__ = _remote_class(type(network))
    network.remote, network.dtype, network.worn = remote, dtype, WeightPatches()
    network.told, network.control_cost, network.extra_cost = {}, ControlCost(), ExtraCost()
    network.translated, network.of_sampling, network.untried = WeakKeyDictionary(), {}, []
    network.owner = Owner(model)
    network.as_made = AsMade(network, is_known_change)


def _calls_wrappers(of: type) -> bool:
    """Whether ComfyUI's own network calls the wrappers that hang around it: that of SD3 doesn't."""
    own = (vars(part).get("forward") for part in of.__mro__)
    return any("DIFFUSION_MODEL" in names(f.__code__) for f in own if isinstance(f, FunctionType))


class _StandsFor(type):
    """Of classes that are equal to the last one of their bases: packs compare a network's class with ComfyUI's."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[-1]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[-1])


def _remote_class(of: type) -> type[torch.nn.Module]:
    """Known by the same name: nodes ask for it."""
    named = {"__module__": of.__module__, "__qualname__": of.__qualname__}
    made: Any = _StandsFor(of.__name__, (RemoteNetwork, of), named)
    return made  # type: ignore[no-any-return]
