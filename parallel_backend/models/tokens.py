"""Latents as tokens, and which of them each rank has.

Shapes: B rows, C latent channels, Y X latent cells, L tokens, P values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..distributed.collectives import split_range, split_sizes
from ..distributed.mesh import Mesh
from ..errors import InputError


@dataclass(frozen=True)
class Tokens:
    """How many tokens there are, and which of them this rank has."""

    image: tuple[int, int]
    text: tuple[int, int]
    image_counts: list[int]
    joint_counts: list[int]

    @classmethod
    def spread(cls, image_tokens: int, text_tokens: int, mesh: Mesh) -> Tokens:
        degree, rank = mesh.sp_degree, mesh.sp_rank
        image, text = split_sizes(image_tokens, degree), split_sizes(text_tokens, degree)
        # The rank that gets one image token less gets the odd text token: loads differ by one at most.
        text.reverse()
        start = sum(text[:rank])
        joint = [i + t for i, t in zip(image, text, strict=True)]
        return cls(split_range(image_tokens, degree, rank), (start, start + text[rank]), image, joint)


class TokenSizes(Protocol):
    """What a model says of the latents that it takes. `pos_embed_size`: the most patches along a side."""

    @property
    def patch_size(self) -> int: ...
    @property
    def pos_embed_size(self) -> int: ...


def tokens_for(config: TokenSizes, mesh: Mesh, height: int, width: int, text_tokens: int) -> Tokens:
    """How a latent of height x width cells and a prompt are spread.

    Raises: InputError: the latent is too large or doesn't divide, or there are fewer tokens than ranks.
    """
    patch, limit = config.patch_size, config.pos_embed_size
    if height % patch or width % patch:
        raise InputError(
            f"A latent of {width}x{height} cells ({width * 8}x{height * 8} pixels) can't be cut in {patch}x{patch} patches.",
            f"Use sides divisible by {patch * 8} pixels.",
        )
    rows, columns = height // patch, width // patch
    if rows > limit or columns > limit:
        raise InputError(
            f"{width * 8}x{height * 8} pixels is larger than this model's position table.",
            f"Use sides of at most {limit * patch * 8} pixels.",
        )
    if text_tokens < 1 or rows * columns + text_tokens < mesh.sp_degree or rows * columns < mesh.sp_degree:
        raise InputError(
            f"{rows * columns} image and {text_tokens} text tokens can't be spread over {mesh.sp_degree} ranks.",
            "Use a larger image, or less ring and ulysses.",
        )
    return Tokens.spread(rows * columns, text_tokens, mesh)


def patchify(x_BCYX: Tensor, patch: int) -> Tensor:
    """(B, L, C * patch * patch), in the order of a convolution's weights."""
    B, C, Y, X = x_BCYX.shape
    x = x_BCYX.view(B, C, Y // patch, patch, X // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, (Y // patch) * (X // patch), C * patch * patch)


def unpatchify(x_BLP: Tensor, shape: torch.Size, patch: int) -> Tensor:
    B, C, Y, X = shape
    x = x_BLP.view(B, Y // patch, X // patch, patch, patch, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, Y, X)
