"""Functions of ComfyUI's own nodes that act between evaluations, and that the backend's loop has: by their node, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isclose
from types import FunctionType
from typing import Any

from torch import Tensor

from ...parallel_backend.config.guidance import APG, AwayFromWeaker, check_neg_scale
from ...parallel_backend.errors import ConfigError
from .patches import Hung, closed_over, in_node, origin
from .perturbed_attention import hung_by_core
from .skip_layers import hung_beside_cond, hung_in_uncond

_PERP_NEG = in_node("nodes_perpneg:PerpNeg", "")
_APG = in_node("nodes_apg:APG", "")
_SLG_NODES = ("SkipLayerGuidanceDiT", "SkipLayerGuidanceSD3")
_SLG = tuple(
    written
    for module in ("nodes_slg", "nodes_sd3")
    for node in _SLG_NODES
    for written in in_node(f"{module}:{node}", "post_cfg_function", "skip_guidance")
)
_SLG_SIMPLE = in_node("nodes_slg:SkipLayerGuidanceDiTSimple", "calc_cond_batch_function", "skip_guidance")
_PAG = in_node("nodes_pag:PerturbedAttentionGuidance", "post_cfg_function")


@dataclass(frozen=True)
class Sampling:
    """Of the sampling on which functions act.

    Args:
        is_flow: of its model. two_prompts: guidance is of cond and uncond, both evaluated. own_guider: a guider that leaves out
            what the MODEL says of guidance in place of classifier-free guidance.
    """

    is_flow: bool
    cfg: float
    two_prompts: bool
    own_guider: bool
    sigmas: Tensor

    @property
    def is_guided(self) -> bool:
        """Otherwise core hands its functions zeros in uncond's place."""
        return self.two_prompts and not isclose(self.cfg, 1.0)


@dataclass(frozen=True)
class Weaker:
    """What a further evaluation is made with, and what leads away from it."""

    hung: Hung
    guidance: AwayFromWeaker


@dataclass(frozen=True)
class Known:
    """What the backend's loop does in place of a MODEL's functions.

    Args:
        shares: settings of `RemoteModel.sample` by name. empty: PerpNeg's prompt, as core holds it, and its neg_scale.
        in_uncond: what hangs in the evaluations of uncond alone.
    """

    shares: Mapping[str, float]
    apg: APG | None = None
    empty: tuple[list[dict[str, Any]], float] | None = None
    weaker: Weaker | None = None
    in_uncond: Hung | None = None


def known_functions(options: Mapping[str, Any], sampling: Sampling) -> tuple[Known, dict[str, Any]]:
    """What of a MODEL's options the loop knows, and the options that this stands for no more."""
    known, others = Known({}), dict(options)
    for option, read in _READERS.items():
        function: Any = options.get(option)
        if isinstance(function, list):
            # The order of several matters.
            function = function[0] if len(function) == 1 else None
        if not isinstance(function, FunctionType):  # a pack's own object is none of core's
            continue
        try:
            found = read(function, sampling, known)
        except ConfigError:  # numbers that the backend's loop doesn't take
            found = None
        if found is not None:
            known = found
            del others[option]
    return known, others


def _cfg_function(function: Any, sampling: Sampling, known: Known) -> Known | None:
    if sampling.own_guider:
        return None
    made_with = closed_over(function)
    if origin(function).startswith("nodes_model_advanced:RescaleCFG."):
        # Made for the other kind of models; older cores' is for all, and not the backend's on flow models.
        share = made_with.get("multiplier", -1.0)
        if made_with.get("is_flow", False) != sampling.is_flow or not 0 <= share <= 1:
            return None
        return replace(known, shares={**known.shares, "rescale_cfg": float(share)})
    if origin(function).startswith(_PERP_NEG) and {"nocond", "neg_scale"} <= made_with.keys() and sampling.is_guided:
        check_neg_scale(made_with["neg_scale"])
        return replace(known, empty=(made_with["nocond"], float(made_with["neg_scale"])))
    return None


def _mask_function(function: Any, sampling: Sampling, known: Known) -> Known | None:
    strength = closed_over(function).get("strength", -1.0)
    if not origin(function).startswith("nodes_differential_diffusion:DifferentialDiffusion.") or not 0 <= strength <= 1:
        return None
    return replace(known, shares={**known.shares, "differential": float(strength)})


def _pre_cfg_function(function: Any, sampling: Sampling, known: Known) -> Known | None:
    """APG, whose running average core keeps for as long as the MODEL lives: here it is that of one sampling."""
    made_with = closed_over(function)
    if not origin(function).startswith(_APG) or sampling.own_guider or not sampling.is_guided or sampling.cfg == 0:
        return None
    settings = {"eta", "norm_threshold", "momentum"}
    if not settings | {"running_avg", "prev_sigma"} <= made_with.keys():
        return None
    apg = APG(**{name: float(made_with[name]) for name in settings})
    former, sigmas = made_with["prev_sigma"], sampling.sigmas
    goes_on = len(sigmas) > 0 and (float(sigmas[-1]) > 0 or (former is not None and bool(sigmas[0] <= former.cpu())))
    return None if apg.momentum != 0 and goes_on else replace(known, apg=apg)


def _post_cfg_function(function: Any, sampling: Sampling, known: Known) -> Known | None:
    made_with, of = closed_over(function), origin(function)
    scale = float(made_with.get("scale", 0))
    if scale <= 0:
        return None
    if of in _PAG and (hung := hung_by_core(function)) is not None:
        return replace(known, weaker=Weaker(hung, AwayFromWeaker(scale)))
    if of in _SLG and (hung := hung_beside_cond(function)) is not None:
        guidance = AwayFromWeaker(scale, hung.start, hung.end, float(made_with.get("rescaling_scale", 0.0)))
        return replace(known, weaker=Weaker(hung, guidance))
    return None


def _calc_cond_batch_function(function: Any, sampling: Sampling, known: Known) -> Known | None:
    if origin(function) not in _SLG_SIMPLE or sampling.own_guider or not sampling.is_guided:
        return None
    hung = hung_in_uncond(function)
    return replace(known, in_uncond=hung) if hung is not None and hung.start >= hung.end else None


_READERS: Mapping[str, Callable[[Any, Sampling, Known], Known | None]] = {
    "sampler_cfg_function": _cfg_function,
    "denoise_mask_function": _mask_function,
    "sampler_pre_cfg_function": _pre_cfg_function,
    "sampler_post_cfg_function": _post_cfg_function,
    "sampler_calc_cond_batch_function": _calc_cond_batch_function,
}
