"""What hangs inside a model, as requests name it: one struct a kind, of numbers, names and tensors.

In a request a tensor is its place among the request's tensors (T is int); a client gives the tensor itself (T is Tensor), and a
rank has it again. Which fields hold tensors, each struct says.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct

from .attention import (
    BlurQueries,
    KeptAttention,
    KeptForm,
    NormalizedGuidance,
    PerturbedAttention,
    ReportScores,
    RowName,
    SharedAttention,
    SharedNorms,
    ShiftedWindows,
    ShuffledTokens,
    SkipBlocks,
    SparseAttention,
    TiledAttention,
)
from .between_blocks import POOLED, DownsampleByFour, Downscale, FreeU, FreeUSite, Rescale, RescaleBack, UpsampleBy
from .prompts import (
    IDENTITY_TOKENS,
    ImagePrompt,
    ImagePromptForm,
    JointImagePrompt,
    NormalizedJointPrompt,
    NormalizedPrompt,
    RegionalPrompts,
    SplitPrompt,
)
from .spec import ExtraSpec, PlaceName, T

AnyExtra: TypeAlias = (
    SkipBlocks
    | PerturbedAttention
    | JointImagePrompt[Any]
    | ImagePrompt[Any]
    | BlurQueries
    | SparseAttention
    | ShuffledTokens[Any]
    | RegionalPrompts[Any]
    | SplitPrompt
    | NormalizedGuidance
    | NormalizedPrompt[Any]
    | NormalizedJointPrompt[Any]
    | ReportScores
    | TiledAttention
    | FreeU
    | Downscale
    | Rescale
    | RescaleBack
    | DownsampleByFour
    | UpsampleBy
    | ShiftedWindows
    | KeptAttention
    | SharedAttention
    | SharedNorms
)  # fmt: skip


class LaterEvaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """What will hang inside, in an evaluation that is to come; `branches`: which prompts its rows are of."""

    extras: list[AnyExtra]
    branches: list[int]


__all__ = [
    "IDENTITY_TOKENS",
    "POOLED",
    "AnyExtra",
    "BlurQueries",
    "DownsampleByFour",
    "Downscale",
    "ExtraSpec",
    "FreeU",
    "FreeUSite",
    "ImagePrompt",
    "ImagePromptForm",
    "JointImagePrompt",
    "KeptAttention",
    "KeptForm",
    "LaterEvaluation",
    "NormalizedGuidance",
    "NormalizedJointPrompt",
    "NormalizedPrompt",
    "PerturbedAttention",
    "PlaceName",
    "RegionalPrompts",
    "ReportScores",
    "Rescale",
    "RescaleBack",
    "RowName",
    "SharedAttention",
    "SharedNorms",
    "ShiftedWindows",
    "ShuffledTokens",
    "SkipBlocks",
    "SparseAttention",
    "SplitPrompt",
    "T",
    "TiledAttention",
    "UpsampleBy",
]
