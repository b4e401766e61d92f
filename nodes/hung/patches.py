"""Functions that nodes hang inside a MODEL, in its transformer options; and what a kind of them says of itself."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from inspect import getclosurevars
from math import inf
from pathlib import PurePath
from types import CellType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ...parallel_backend.rpc.extras import AnyExtra

# By the `origin` of a replacement, its variable that holds what hung there before.
_KEPT_WITHIN = {"nag_nodes:nag_attn2_replace_wrapper.<locals>.nag_attn2_replace": "prev_attn2_replace"}
# The kind of one that a node has put on a layer of the network itself, in place of its forward.
FORWARD = "forward"


@dataclass(frozen=True)
class Patch:
    """One function, and where it hangs.

    Args:
        kind: as ComfyUI calls it: "attn2", "dit", "output_block_patch"; or `FORWARD`.
        place: of one that replaces: ("middle", 0), ("input", 4, 1), ("double_block", 7), a layer's name; None of those that are called
            everywhere.
    """

    kind: str
    place: tuple[Any, ...] | None
    function: Any

    @property
    def told(self) -> str:
        """As errors name it: by its place and its function."""
        module, _, name = origin(self.function).partition(":")
        at = "" if self.place is None else f" patch at {' '.join(map(str, self.place))}"
        return f"the {self.kind}{at} by {name} of {module}"


@dataclass(frozen=True)
class Schedule:
    """Sigmas at which a sampling evaluates the network, of a MODEL with a function `around` that which patches are told by."""

    sigmas: tuple[float, ...]
    around: Any


@dataclass(frozen=True)
class Call:
    """The evaluation, or all evaluations of a sampling, for which patches become extras.

    Args:
        network: ComfyUI's own, without weights. shape: (B, C, Y, X) of what it is given, all prompts' rows.
        branches: which prompts the rows are of, as many rows for each: 0 cond, 1 uncond.
        sigma: None for all of a sampling.
        options: the transformer options.
        tokens: of each row's prompt; of a whole sampling, of cond's. 0 where nothing asks.
        schedule: of all of a sampling, where a function around the network belongs to its patches.
        device: on which ComfyUI would compute it, where it draws by chance.
        rehearsed: of an evaluation that is tried before the sampling's first, and of which nothing is to be remembered: the sigmas
            between which there will be such.
    """

    network: Module
    shape: tuple[int, ...]
    branches: tuple[int, ...]
    sigma: float | None
    options: Mapping[str, Any]
    tokens: int = 0
    schedule: Schedule | None = None
    device: torch.device | str = "cpu"
    rehearsed: tuple[float, float] | None = None

    @property
    def layout(self) -> tuple[int, ...]:
        """`branches` in the order of their rows in an evaluation; of a whole sampling, ComfyUI would put the last one first."""
        return self.branches[::-1] if self.sigma is None else self.branches

    @property
    def dtype(self) -> Any:
        """That in which the ranks compute."""
        return self.network.dtype

    @property
    def alone(self) -> dict[str, float | None]:
        """The range of an extra that hangs in evaluations like this one alone."""
        start, end = self.rehearsed or (self.sigma, self.sigma)
        return {"start": None if start == inf else start, "end": end}

    @property
    def is_unet(self) -> bool:
        return hasattr(self.network, "input_blocks")


@dataclass(frozen=True)
class Hung:
    """What a guidance function adds to a MODEL's options for an evaluation of its own, of one prompt.

    Args:
        options: transformer options that are set. branch: the prompt's number. start, end: sigmas between which it evaluates that.
    """

    patches: Sequence[Patch] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    branch: int = 0
    start: float = inf
    end: float = 0.0

    def beside(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those transformer options with these added, as ComfyUI adds them: a replacement takes the place of what hung there."""
        replaced = {kind: {**by_place} for kind, by_place in options.get("patches_replace", {}).items()}
        for patch in self.patches:
            replaced.setdefault(patch.kind, {})[patch.place] = patch.function
        return {**options, **self.options, "patches_replace": replaced}


@dataclass(frozen=True)
class Guidance:
    """A guidance function of a MODEL, of one `origin`, that hangs patches while it samples.

    Args:
        hangs: function -> what it does hang; None where it does nothing.
        refused: (function, network) -> what of its settings can't be honoured.
    """

    hangs: Callable[[Any], Hung | None]
    refused: Callable[[Any, Module], Iterator[str]] = lambda *_: iter(())


@dataclass(frozen=True)
class Kind:
    """One kind of patches.

    Args:
        knows: whether a patch is of it, from where its function comes and what that holds.
        extras: of those that it knows, in their order. Raises: UnsupportedError, InputError: one that can't be honoured.
        functions: guidance functions of a MODEL that hang such patches while they sample, by `origin`.
        reported: by extra that reports, what is done with its report: (patches of this kind, call, (B, N), the latent that the
            network was given).
        option: a transformer option that asks for extras without a patch.
        told: whether a transformer option, among all of them, only says what the ranks have from elsewhere: (its name, all of them).
        left: whether its nodes leave that on layers, where it changes nothing by itself: (the attribute's name, its value).
        step_by_step: why a patch that it knows can't be had for all evaluations of a sampling at once.
    """

    knows: Callable[[Patch], bool]
    extras: Callable[[Sequence[Patch], Call], Iterable[AnyExtra]]
    functions: Mapping[str, Guidance] = field(default_factory=dict)
    reported: Mapping[type, Callable[[Sequence[Patch], Call, Tensor, Tensor], None]] = field(default_factory=dict)
    option: str | None = None
    told: Callable[[str, Mapping[str, Any]], bool] = lambda *_: False
    left: Callable[[str, Any], bool] = lambda *_: False
    step_by_step: Callable[[Patch], Iterator[str]] = lambda _: iter(())


def patches_in(options: Mapping[str, Any]) -> Iterator[Patch]:
    """In the order in which ComfyUI's network calls them at one place; what a replacement holds and calls comes before it."""
    for kind, by_place in options.get("patches_replace", {}).items():
        hung = [Patch(kind, place, function) for place, function in by_place.items() if function is not None]
        layers = [hung]
        while inner := [within for patch in layers[-1] if (within := _within(patch)) is not None]:
            layers.append(inner)
        yield from (patch for layer in reversed(layers) for patch in layer)
    for kind, functions in options.get("patches", {}).items():
        yield from (Patch(kind, None, function) for function in functions)


def replacement_at(place: tuple[Any, ...], kind: str, options: Mapping[str, Any]) -> Patch | None:
    """What takes a transformer block's attention's place: one of its own, or of all of the block that it is in; None where nothing does."""
    replaced = options.get("patches_replace", {}).get(kind, {})
    return next((Patch(kind, at, replaced[at]) for at in (place, place[:2]) if at in replaced), None)


def _within(patch: Patch) -> Patch | None:
    """What hung at its place before, where it is one that keeps that and calls it."""
    cell = _KEPT_WITHIN.get(origin(patch.function))
    held = None if cell is None else getclosurevars(patch.function).nonlocals.get(cell)
    return None if held is None else replace(patch, function=held)


def forwards_in(network: Any) -> Iterator[Patch]:
    """Those that stand in place of layers' own forwards, the network's aside."""
    return (Patch(FORWARD, (name,), put) for name, put in network.as_made.forwards())


def origin(function: Any) -> str:
    """Where a function, or an object that is called as one, was written: "nodes_slg:SkipLayerGuidanceDiT.execute.<locals>.skip".

    The module is the last part of its name alone: ComfyUI loads a pack, and each file of its own extra nodes, under its path.
    """
    made = function if hasattr(function, "__qualname__") else type(function)
    return f"{PurePath(made.__module__ or '').name.rpartition('.')[2]}:{made.__qualname__}"


def in_node(node: str, function: str, older: str = "patch") -> tuple[str, str]:
    """The `origin` of a function that a node of core's makes: in `execute`, or in a method of the node's own in older cores."""
    return f"{node}.execute.<locals>.{function}", f"{node}.{older}.<locals>.{function}"


def is_made_by(patch: Patch, kind: str, origins: Container[str], holds: Set[str]) -> bool:
    """Whether it hangs as this kind, is a function of one of these origins, and holds values of these names and no others."""
    if patch.kind != kind or origin(patch.function) not in origins:
        return False
    is_empty = CellType() in (patch.function.__closure__ or ())
    return not is_empty and set(patch.function.__code__.co_freevars) == holds


def closed_over(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function made inside another has of it, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != CellType()}


def hands_on(function: Any, place: int, arguments: int) -> bool:
    """Whether a function of so many arguments, the last of them a mapping, gives back the one at `place` as it came."""
    given = [*(object() for _ in range(arguments - 1)), {}]
    try:
        return function(*given) is given[place]
    except Exception:  # noqa: BLE001 - whatever it does with what it is given, it does something with it
        return False
