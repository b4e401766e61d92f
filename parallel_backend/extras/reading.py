"""Extras from a request, made ready for a model; those of a sampling that goes step by step are made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from operator import is_
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import InputError, UnsupportedError
from ..models.extra import Extra
from ..models.prediction import Predictor
from ..rpc.extras import (
    AnyExtra,
    BlurQueries,
    DownsampleByFour,
    Downscale,
    ExtraSpec,
    FreeU,
    ImagePrompt,
    JointImagePrompt,
    KeptAttention,
    NormalizedGuidance,
    NormalizedJointPrompt,
    NormalizedPrompt,
    PerturbedAttention,
    RegionalPrompts,
    ReportScores,
    Rescale,
    RescaleBack,
    SharedAttention,
    SharedNorms,
    ShiftedWindows,
    ShuffledTokens,
    SkipBlocks,
    SparseAttention,
    SplitPrompt,
    TiledAttention,
    UpsampleBy,
)
from .attention_scores import AttentionScores
from .blurred_queries import BlurredQueries
from .deep_shrink import SmallerWithin
from .free_u import WeighedSkips
from .image_prompt import PromptedAttention
from .inner_sides import check_inner_sides
from .joint_image_prompt import JointAdapter
from .kept_attention import GatedAttention
from .kept_outputs import Samplings
from .normalized_attention import NormalizedAttention
from .normalized_joint_prompt import JointNormalizedAttention
from .normalized_prompt import PromptNormalizedAttention
from .perturbed_attention import IdentityAttention
from .rau_net import OtherUpsample, RescaledBack, RescaledBlocks, WideDownsample
from .regional_prompts import RegionalAttention, SplitPromptAttention
from .shared_attention import AttendedTogether
from .shared_norms import NormedTogether
from .shifted_windows import WindowedAttention
from .shuffled_tokens import TokenOrders
from .skip_blocks import SkippedBlocks
from .sparse_attention import SparseCrossAttention
from .target import Target
from .tiled_attention import QueryTiles

# By what a request names, what applies it; and the networks that have places for it.
_KINDS: dict[type[ExtraSpec], tuple[Any, str]] = {
    SkipBlocks: (SkippedBlocks, "mmdit"),
    PerturbedAttention: (IdentityAttention, "unet"),
    JointImagePrompt: (JointAdapter, "mmdit"),
    ImagePrompt: (PromptedAttention, "unet"),
    BlurQueries: (BlurredQueries, "unet"),
    SparseAttention: (SparseCrossAttention, "unet"),
    ShuffledTokens: (TokenOrders, "unet"),
    RegionalPrompts: (RegionalAttention, "unet"),
    SplitPrompt: (SplitPromptAttention, "unet"),
    NormalizedGuidance: (NormalizedAttention, "unet"),
    NormalizedJointPrompt: (JointNormalizedAttention, "mmdit"),
    NormalizedPrompt: (PromptNormalizedAttention, "unet"),
    ReportScores: (AttentionScores, "unet"),
    TiledAttention: (QueryTiles, "unet"),
    FreeU: (WeighedSkips, "unet"),
    Downscale: (SmallerWithin, "unet"),
    Rescale: (RescaledBlocks, "unet"),
    RescaleBack: (RescaledBack, "unet"),
    DownsampleByFour: (WideDownsample, "unet"),
    UpsampleBy: (OtherUpsample, "unet"),
    ShiftedWindows: (WindowedAttention, "unet"),
    KeptAttention: (GatedAttention, "unet"),
    SharedAttention: (AttendedTogether, "unet"),
    SharedNorms: (NormedTogether, "unet"),
}
# Of samplings that take turns, each with a few.
MOST_KEPT = 16


@dataclass(frozen=True)
class _Made:
    predictor: ref[Predictor]
    tensors: tuple[ref[Tensor], ...]
    extra: Extra

    def is_used(self) -> bool:
        return self.predictor() is not None and all(tensor() is not None for tensor in self.tensors)


class Extras:
    """Those that a rank has made of requests, as long as what they were made of is kept."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[Any, ...], _Made] = OrderedDict()
        self._fitting: tuple[Extra, ...] = ()
        self._samplings = Samplings()
        # Of single tensors, by extras that come anew with each evaluation.
        self._parts: MutableMapping[Tensor, Any] = WeakIdKeyDictionary()

    def read(
        self,
        asked: Sequence[AnyExtra],
        tensors: Sequence[Tensor],
        predictor: Predictor,
        size: tuple[int, int],
        branches: Iterable[int],
    ) -> tuple[Extra, ...]:
        """What a request names, for rows of these branches, of latents of that height and width.

        Raises: InputError, UnsupportedError: it doesn't fit the model.
        """
        self._keep_used()
        made = tuple(self._of(spec.each(lambda index: tensors[index]), predictor, *size) for spec in asked)
        for extra in made:
            extra.check(branches)
            extra.check_beside(made)
        # Step by step the same ones come with each evaluation, each made for its model and size.
        if len(made) != len(self._fitting) or not all(map(is_, made, self._fitting)):
            check_inner_sides(made, Target(predictor, *size))
            # What keeps outputs of a sampling comes anew each time, and is let go of with it.
            self._fitting = () if any(extra.has_memory for extra in made) else made
        return made

    def forget(self) -> None:
        """Nothing is kept."""
        self._made.clear()
        self._fitting = ()
        self._samplings.clear()
        self._parts.clear()

    def prune(self) -> bool:
        """What was made for models that have left is gone. Returns: whether there was something."""
        before = len(self._made)
        self._keep_used()
        is_less, self._fitting = len(self._made) < before, ()
        for tensor, kept in list(self._parts.items()):
            self._parts[tensor] = [one for one in kept if one[0]() is not None]
            is_less |= len(self._parts[tensor]) < len(kept)
        return is_less

    def _keep_used(self) -> None:
        self._made = OrderedDict((key, made) for key, made in self._made.items() if made.is_used())

    def end(self, samplings: Iterable[str]) -> None:
        """Nothing is kept of samplings of these names."""
        for name in samplings:
            self._samplings.pop(name, None)

    def _of(self, spec: AnyExtra, predictor: Predictor, height: int, width: int) -> Extra:
        key = (repr(spec.each(id)), id(predictor), height, width)
        # Nothing that is in use has another's number.
        made = self._made.pop(key, None)
        if made is None:
            extra = read_extra(spec, Target(predictor, height, width, self._samplings, self._parts))
            made = _Made(ref(predictor), tuple(map(ref, spec.tensors())), extra)
        if made.extra.has_memory:  # it ends with its sampling
            return made.extra
        self._made[key] = made
        while len(self._made) > MOST_KEPT:
            self._made.popitem(last=False)
        return made.extra


def check_together(made: Sequence[Extra]) -> None:
    """Raises: UnsupportedError: one makes the picture within smaller, and another, at the same step, knows tokens by their place; or
    two have text of their own.
    """
    for resizing in (extra for extra in made if extra.resizes):
        sized = [extra.name for extra in made if extra.has_sizes and extra.meets(resizing)]
        if sized:
            raise UnsupportedError(
                f"{', '.join(sized)} can't be honoured beside {resizing.name}, which gives the blocks within a picture of another size.",
                "Remove one of them (masks of an image prompt, regional prompts or HyperTile; deep shrink or RAUNet), or let them act at "
                "different steps.",
            )
    if len(with_text := [extra.name for extra in made if extra.has_text]) > 1:
        raise UnsupportedError(f"{' and '.join(with_text)} can't be honoured together.", "Remove one of them.")


def read_extra(spec: AnyExtra, target: Target) -> Extra:
    """`spec` with its tensors, made ready for a model. Raises: InputError, UnsupportedError: it doesn't fit."""
    kind, network = _KINDS[type(spec)]
    has = {"unet": target.unet is not None, "mmdit": target.mmdit is not None}
    if not has[network]:
        raise UnsupportedError(
            f"{type(spec).__name__} acts inside {_NAMES[network]}; this model is a {target.config.family}.",
            "Remove the node that hangs it on the MODEL, or load a model of that kind.",
        )
    _check_finite(spec)
    start, end = (default if sigma is None else sigma for sigma, default in ((spec.start, inf), (spec.end, 0.0)))
    if not start >= end >= 0:
        raise InputError(f"{type(spec).__name__} acts from sigma {start} to {end}.", "Give the greater sigma first.")
    extra: Extra = kind.read(spec, target, {"start": start, "end": end})
    return extra


def _check_finite(spec: ExtraSpec) -> None:
    """Raises: InputError: a number is none. Of its range NaN is told where that is looked at."""
    for name in spec.__struct_fields__:
        if name not in ("start", "end", *spec.tensor_fields) and not _is_finite(getattr(spec, name)):
            raise InputError(
                f"{name} of {type(spec).__name__} is {getattr(spec, name)}, which is not finite.",
                "Give finite numbers.",
            )


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or isfinite(value)


_NAMES = {"unet": "a UNet", "mmdit": "an MMDiT"}
