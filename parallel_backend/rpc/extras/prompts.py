"""Extras of requests that bring prompts: image prompts, regional prompts, prompts to be guided away from."""

from __future__ import annotations

from typing import ClassVar, Generic, Literal, TypeAlias

import msgspec

from .spec import ExtraSpec, PlaceName, T


class JointImagePrompt(ExtraSpec, Generic[T], frozen=True):
    """Beside the joint attention of an MMDiT's blocks, one of the image's queries to image and image prompt; its result is added.

    Keys and values are made of the image prompt's tokens in the ranks, by each block's matrices after a layer norm that is shifted
    and scaled: the matrices are sent once, tokens, shifts and scales change with the timestep.
    Source: InstantX's IP-Adapter for SD3.5.

    Args:
        norms: by block, (3, H), weights of further RMS norms of the image's queries and keys, after the block's own, and of the image
            prompt's keys.
        matrices: by block, (2, N * H, E), of keys and of values.
        tokens: by branch, (sigmas, rows, T, E), rows 1 or as many as latents.
        modulation: by branch, (sigmas, rows, blocks, 2, E), what the normed tokens are shifted by, and 1 less than what they are
            multiplied by.
        sigmas: those of tokens and modulation; it acts at these alone. Where none is named, there is one of each, at whatever sigma.
        weight: what the result is multiplied by.
    """

    blocks: list[int]
    norms: list[T]
    matrices: list[T]
    tokens: dict[int, T]
    modulation: dict[int, T]
    sigmas: list[float] = msgspec.field(default_factory=list)
    weight: float = 1.0

    tensor_fields: ClassVar[tuple[str, ...]] = ("norms", "matrices", "tokens", "modulation")
    fresh_fields: ClassVar[tuple[str, ...]] = ("tokens", "modulation")


# How the output for a picture comes to that for the prompt: as it is; its part that is orthogonal to that one, over all tokens; or
# with so much of the other part, too, as the share of attention that the identity's tokens get.
ImagePromptForm: TypeAlias = Literal["added", "orthogonal", "partly_orthogonal"]


# The first ones of a picture's, which PuLID makes of the face alone.
IDENTITY_TOKENS = 5


class ImagePrompt(ExtraSpec, Generic[T], frozen=True):
    """Attention to a picture's keys and values beside that to the prompt, at cross-attentions of a UNet.

    Args:
        tokens: of the picture, at each of the places.
        rows: of which prompt each row of the tensors is (0 cond, 1 uncond), and for which latent of its batch; None for all of them.
        keys_values: (rows, N), place after place (tokens, 2 * width); the values times the weight that the place has.
        masks: (rows, M), place after place how much each of the whole latent's tokens there takes; None where all take all of it.
        regions: beside regional prompts, to the outputs for which of a row's prompts it is added: 0 the row's own, which uncond has
            alone. None where there are none.
    Source: IP-Adapter (Ye et al. 2023, arXiv 2308.06721), equation 5.
    """

    places: list[PlaceName]
    tokens: list[int]
    rows: list[tuple[int, int | None]]
    keys_values: T
    masks: T | None = None
    form: ImagePromptForm = "added"
    regions: list[int] | None = None

    tensor_fields: ClassVar[tuple[str, ...]] = ("keys_values", "masks")


class RegionalPrompts(ExtraSpec, Generic[T], frozen=True):
    """Attention of cond's rows to several prompts, at all cross-attentions of a UNet: of each what its mask says. Uncond has none.

    Args:
        strength: of the row's own prompt, whose keys and values are times that.
        keys, values: the other prompts (1, tokens, context width), of which keys and values are made; no values where they are the same.
        masks: by scale of the picture, (prompts, tokens of the whole picture), the own prompt first; of each token they sum to 1.
    """

    strength: float
    keys: list[T]
    values: list[T] | None
    masks: list[T]

    tensor_fields: ClassVar[tuple[str, ...]] = ("keys", "values", "masks")


class SplitPrompt(ExtraSpec, frozen=True):
    """Of a prompt's tokens, at all cross-attentions of a UNet, those of even number are keys, those of odd number values: NegPiP."""


class NormalizedPrompt(ExtraSpec, Generic[T], frozen=True):
    """As `NormalizedGuidance`, of a UNet's attentions to the prompt: what cond's rows take is guided away from what they take of
    another prompt. Uncond's rows stay as they are, evaluated or not.

    Args:
        prompt: (1, tokens, context width), of which each of the places makes keys and values.
    """

    places: list[PlaceName]
    prompt: T
    scale: float
    alpha: float
    tau: float

    tensor_fields: ClassVar[tuple[str, ...]] = ("prompt",)


class NormalizedJointPrompt(ExtraSpec, Generic[T], frozen=True):
    """As `NormalizedPrompt`, of all joint attentions of an MMDiT: image tokens of cond's rows are guided away from what they would
    take beside the text tokens of another prompt, which go through the blocks beside them.

    Args:
        context, pooled: the other prompt, one row each, of as many tokens as the rows' prompts.
    """

    context: T
    pooled: T
    scale: float
    alpha: float
    tau: float

    tensor_fields: ClassVar[tuple[str, ...]] = ("context", "pooled")
