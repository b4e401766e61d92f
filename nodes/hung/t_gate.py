"""T-Gate of the pack ComfyUI_TGate: attention layers that are computed until a step, and kept from there on.

The node puts its own forward in the place of that of each transformer block, for good. It does nothing until the MODEL's wrapper says
so in an evaluation's options; from a step on that wrapper evaluates cond alone, in ComfyUI's process.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ...parallel_backend.errors import UnsupportedError
from ...parallel_backend.rpc.extras import AnyExtra, KeptAttention, KeptForm
from .pack_version import pack_and_version
from .patches import FORWARD, Call, Kind, Patch, closed_over, origin
from .refusal import RELOAD
from .unet_places import all_places

_FORWARD = "TGate:make_tgate_forward.<locals>.tgate_forward"
_HOLDS = {"attn_cache", "only_cross_attention", "sigma_gate", "sigma_gate_attn1", "use_cpu_cache"}
_ENABLED, _CLEARED = "tgate_enable", "tgate_clear"


@dataclass
class _Kept:
    """Which layers' outputs are kept."""

    of_self: bool = False
    of_cross: bool = False

    def note(self, own: KeptForm, cross: KeptForm, cleared: bool) -> None:
        self.of_self = (self.of_self or own == "kept") and not cleared
        self.of_cross = (self.of_cross or cross == "kept") and not cleared


@dataclass
class _Sampling:
    """What the ranks keep of a sampling, under its name."""

    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    kept: _Kept = field(default_factory=_Kept)


@dataclass(frozen=True)
class _Gates:
    """As the node made them. Below these sigmas attentions to the prompt are taken from what was kept, and self-attentions."""

    cross: float
    own: float
    only_cross: bool

    def forms(self, sigma: float, kept: _Kept) -> tuple[KeptForm, KeptForm]:
        """What an evaluation does, of self-attention and of attention to the prompt."""
        own: KeptForm = "computed" if self.only_cross else "kept"
        if not self.only_cross and sigma < self.own and kept.of_self:
            own = "taken_mean" if sigma < self.cross else "taken"
        if sigma < self.cross and kept.of_cross:
            return own, "taken_mean" if self.only_cross or sigma < self.own else "taken"
        return own, "kept"


def _is_told(option: str, options: Mapping[str, Any]) -> bool:
    """Whether a transformer option is what the wrapper says while it samples: a MODEL that carries it is of the node's older form."""
    return option in (_ENABLED, _CLEARED) and "sigmas" in options


def _knows(patch: Patch) -> bool:
    function = _unbound(patch)
    return patch.kind == FORWARD and origin(function) == _FORWARD and closed_over(function).keys() == _HOLDS


def _unbound(patch: Patch) -> Any:
    return getattr(patch.function, "__func__", patch.function)


def _extras(patches: Sequence[Patch], call: Call) -> Iterable[AnyExtra]:
    """Raises: UnsupportedError: blocks of a MODEL that differ, or that go on with what another sampling kept."""
    if not call.options.get(_ENABLED) or call.rehearsed is not None:
        return
    gates = {_gates(patch) for patch in patches}
    if len(gates) != 1 or len(patches) != len(list(all_places(call.network))):
        told = pack_and_version(patches[0].function)
        raise UnsupportedError(f"A parallel MODEL can't honour {told} with blocks of unlike settings.", RELOAD)
    of_sampling: dict[str, Any] = call.network.of_sampling  # type: ignore[assignment]
    sampling = next((known for known in of_sampling.values() if isinstance(known, _Sampling)), None) or _Sampling()
    of_sampling[sampling.name] = sampling
    # The node's own forwards keep theirs beyond a sampling that doesn't come to timestep 0.
    of_node: _Kept = call.network.translated.setdefault(_unbound(patches[0]), _Kept())  # type: ignore[operator,union-attr]
    sigma, made_with = inf if call.sigma is None else call.sigma, gates.pop()
    own, cross = made_with.forms(sigma, sampling.kept)
    if made_with.forms(sigma, of_node) != (own, cross):
        raise UnsupportedError(
            f"{pack_and_version(patches[0].function)} would take what an earlier sampling kept, which did not end at timestep 0.",
            "Make all steps in one sampler, take a scheduler that ends there (normal, karras), or remove T-Gate from the later one.",
        )
    for kept in (sampling.kept, of_node):
        kept.note(own, cross, bool(call.options.get(_CLEARED)))
    yield KeptAttention(sampling=sampling.name, self_attention=own, cross_attention=cross)


def _gates(patch: Patch) -> _Gates:
    made_with = closed_over(_unbound(patch))
    cross, own = (float(made_with[name]) for name in ("sigma_gate", "sigma_gate_attn1"))
    return _Gates(cross, own, bool(made_with["only_cross_attention"]))


KIND = Kind(_knows, _extras, told=_is_told)
