"""The models that a rank holds, and room for another one."""

from __future__ import annotations

import ctypes
import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from ..config import MeshSpec
from ..distributed.control import Control
from ..distributed.device_memory import give_back, memory_of
from ..errors import ConfigError, InputError, UnknownModelError
from ..extras.weights import PatchedWeights
from ..models.control_use import ControlNetwork
from ..models.prediction import Predictor
from ..models.vae import BandVAE
from ..rpc.state import ModelState
from .room import check_fits, fits


@dataclass
class Resident:
    """A model that is held, and what is said of it; `weights` of what can be patched.

    `base`: the name of the model that a ControlNet is for, with which it leaves; `is_of_weights`: it is made of that one's.
    """

    model: Predictor | BandVAE | ControlNetwork
    state: ModelState
    channels: int
    weights: PatchedWeights | None = None
    base: str = ""
    is_of_weights: bool = False

    @property
    def told(self) -> ModelState:
        """What is said of it, with what lies on its weights now."""
        if self.weights is None:
            return self.state
        return msgspec.structs.replace(self.state, patched=self.weights.patched)


class _Sizes(msgspec.Struct):
    """What a rank says before a load: bytes that the model needs there, bytes held, bytes free."""

    needed: int
    held: int
    free: int


class Residents(OrderedDict[str, Resident]):
    """By name, the least recently used first. Ranks load and use the same in the same order, so they hold the same.

    Args:
        budget: bytes per rank; the least recently used leave when it is passed. 0 is no budget.
        sharers: ranks that share the device's memory.
        on_leave: called after some have left.
    """

    def __init__(self, device: torch.device, budget: int, sharers: int, on_leave: Callable[[], None]) -> None:
        super().__init__()
        self._device, self._budget, self._sharers, self._on_leave = device, budget, sharers, on_leave

    @property
    def held_bytes(self) -> int:
        return sum(resident.state.rank_bytes for resident in self.values())

    def model(self, name: str, kind: type) -> Any:
        """The model of that name, now used. Raises: UnknownModelError: none is held. InputError: it is none of that kind."""
        if name not in self:
            raise UnknownModelError(f"The backend does not hold {name!r} (any more).", "Load it again.")
        self.move_to_end(name)
        model = self[name].model
        if not isinstance(model, kind):
            raise InputError(
                f"{name!r} is not a model for this request.", "Use a diffusion model to sample, a VAE to decode."
            )
        return model

    def let_go(self, *names: str) -> None:
        """They are gone, those that were there, and their memory is free."""
        for name in [*names, *(name for name, resident in self.items() if resident.base in names)]:
            self.pop(name, None)
        self.clear_up()

    def clear_up(self) -> None:
        """Nothing is left of models that have gone, or that failed to come.

        Comm: `on_leave`'s.
        """
        self.give_back_memory()
        self._on_leave()

    def make_room(
        self, needed: int, name: str, kind: str, spec: MeshSpec, control: Control, *, beside: str = ""
    ) -> list[str]:
        """Lets models go, oldest use first, until `needed` more bytes fit the budget and the memory of every rank.

        Args:
            beside: the model that is to stay in any case.
        Returns: those that left. Raises: ConfigError, OutOfMemoryError: they don't fit without any other; then all stay.
        """
        stays = self[beside].state.rank_bytes if beside else 0

        def check(without: int) -> None:
            """Whether they would fit once so many bytes of other models are gone."""
            free = self.free_bytes() + without
            check_fits(needed, free, self._device.type, name, kind, spec, control.world_size, control.rank)

        most = max(sizes.needed for sizes in self._everywhere(needed + stays, control))
        if self._budget and most > self._budget:
            both = f"{name} and {self[beside].state.name} need" if beside else f"{name} needs"
            raise ConfigError(
                f"{both} {most / 2**20:.0f} MiB on a rank; the budget is {self._budget / 2**20:.0f} MiB.",
                "Raise the memory budget, use a smaller dtype, or spread the weights further: tp or pp (MMDiT), sliced (UNet).",
            )
        ranks = self._everywhere(needed, control)
        most = max(sizes.needed for sizes in ranks)
        if self._is_short(ranks):  # what is made anew within a step goes first
            self.let_go_of_graphs()
        control.agreed(lambda: check(self.held_bytes - stays))
        evicted: list[str] = []
        while others := [other for other in self if other != beside]:
            ranks = self._everywhere(needed, control)
            if not self._is_short(ranks) and not (
                self._budget and most + max(rank.held for rank in ranks) > self._budget
            ):
                break
            oldest = others[0]
            evicted.append(self[oldest].state.name)
            self.let_go(oldest)
        control.agreed(lambda: check(0))
        return evicted

    def keep_within(self, budget: int, control: Control) -> None:
        """Another budget from now on, on all ranks; the least recently used leave until the others keep to it.

        Comm: a few bytes, as often as one leaves.
        """
        self._budget = budget
        while budget and self and max(rank.held for rank in self._everywhere(0, control)) > budget:
            self.let_go(next(iter(self)))

    def _everywhere(self, needed: int, control: Control) -> list[_Sizes]:
        return control.gather(_Sizes(needed, self.held_bytes, self.free_bytes()))

    def _is_short(self, ranks: Sequence[_Sizes]) -> bool:
        return any(not fits(rank.needed, rank.free, self._device.type) for rank in ranks)

    def let_go_of_graphs(self) -> None:
        """No model has any: they are made again when they are wanted."""
        for resident in self.values():
            if isinstance(resident.model, Predictor) and resident.model.captured is not None:
                resident.model.captured.drop()
        self.give_back_memory()

    def free_bytes(self) -> int:
        """This rank's part of what its device has free."""
        return memory_of(self._device)[0] // self._sharers

    def give_back_memory(self) -> None:
        """What was freed can be had by other programs; models with hooks or compiled blocks are cycles until collected."""
        gc.collect()
        give_back(self._device)
        if self._device.type == "cpu":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; the launcher has it keep what is freed
            if trim is not None:
                trim(0)
